"""The correctness gate of the attention benchmark: no pass, no number.

Too long for a full oracle, so samples are computed exactly, in fp32 from the definition: single queries (choice
of blocks, out, lse, dq) and single keys (dk, dv, over every query that chose their block). A sample passes if its
error is at most twice that of the same computation written with bf16 torch operations (or the input's dtype).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from eval.bench.inputs import Inputs
from model.moba import triton_op, triton_union, triton_union_backward
from model.moba.blocks import BlockTable, build_block_table
from model.moba.triton_gate import choose
from model.moba.triton_plan import default_budget

QUERIES = 48  # sampled (token, head)
BLOCKS = 3  # sampled (block, key head)
KEYS = 8  # sampled keys of such a block
SCORE_BITS = 15  # a chosen block may score lower than one left out by 2^-15 of the largest score
ERROR_RATIO = 2.0
_ROWS = 1 << 16  # query rows in one piece of a dk, dv sample


class CheckFailed(RuntimeError):
    """The kernels disagree with the oracle; nothing is timed."""


def check(x: Inputs, seed: int = 0, path: Literal["routed", "union"] = "routed") -> tuple[dict[str, float], int]:
    """Errors relative to the norm of the exact values, and the number of (query, head, past block) pairs.

    Args:
        path: which of the exact paths (see `model.moba.triton_rule`).

    Raises:
        CheckFailed: naming what differs and by how much.
    """
    shape = x.shape
    q, k = x.q.detach(), x.k.detach()
    table = build_block_table(x.cu_seqlens, shape.seq_len, shape.block_size)
    scale = shape.head_dim**-0.5
    past = min(shape.topk - 1, table.max_past)
    table = dataclasses.replace(table, complete_past=past)
    ids = choose(q, k, table, past)
    out, lse2, (dq, dk, dv) = _passes(x, ids, table, scale, path)
    generator = torch.Generator().manual_seed(seed)
    errors = _queries(x, ids, table, out, lse2, dq, generator)
    errors |= _keys(x, ids, table, out, lse2, dk, dv, generator)
    return errors, int((ids >= 0).sum())


def _passes(
    x: Inputs, ids: Tensor, table: BlockTable, scale: float, path: str
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """out, lse2 and (dq, dk, dv) of the kernels of one path."""
    q, k, v = x.q.detach(), x.k.detach(), x.v.detach()
    if path == "union":
        out, lse2, found = triton_union.forward_pass(q, k, v, ids, table, scale)
        return out, lse2, triton_union_backward.backward_pass(q, k, v, out, lse2, x.dout, table, scale, found)
    T, H, D = q.shape
    budget = default_budget(T, H, k.shape[1], D, q.element_size())
    reach = triton_op.reach_of(table, D)
    out, lse2, lists = triton_op.forward_pass(q, k, v, ids, table, reach, scale, budget)
    grads = triton_op.backward_pass(q, k, v, ids, out, lse2, x.dout, table, reach, scale, budget, lists)
    return out, lse2, grads


def _queries(
    x: Inputs, ids: Tensor, table: BlockTable, out: Tensor, lse2: Tensor, dq: Tensor, g: torch.Generator
) -> dict[str, float]:
    T, H, D = x.q.shape
    G, scale = H // x.k.shape[1], D**-0.5
    mean = _means(x, table)
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"out": [], "dq": []}
    tokens = torch.randint(T, (QUERIES,), generator=g).tolist()
    for t, h in zip([T - 1, *tokens[1:]], torch.randint(H, (QUERIES,), generator=g).tolist(), strict=True):
        q, dout = x.q[t, h].detach(), x.dout[t, h]
        chosen = [b for b in ids[t, h].tolist() if b >= 0]
        _check_choice(
            q, mean[:, h // G], chosen, int(table.first_block[t]), int(table.own_block[t]), ids.shape[-1]
        )
        keys = [torch.arange(int(table.own_start[t]), t + 1, device=q.device)]
        starts = table.block_start[torch.tensor(chosen, device=q.device, dtype=torch.long)].tolist()
        keys += [torch.arange(s, s + table.block_size, device=q.device) for s in starts]
        index = torch.cat(keys)
        k, v = x.k.detach()[index, h // G], x.v.detach()[index, h // G]
        exact = _row(q.float(), k.float(), v.float(), dout.float(), scale)
        rough = _row(q, k, v, dout, scale)
        if abs(float(exact[2]) - float(lse2[t, h]) * math.log(2)) > 1e-3:
            raise CheckFailed(f"{x.shape}: lse of token {t}, head {h} is off")
        rows["out"].append((out[t, h], exact[0], rough[0]))
        rows["dq"].append((dq[t, h], exact[1], rough[1]))
    return {name: _compare(name, x, samples) for name, samples in rows.items()}


def _row(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, dq and lse of one query over the keys it sees, every step in the dtype of the inputs."""
    score = (k @ q) * scale
    p = torch.softmax(score, 0)
    out = p @ v
    ds = p * (v @ dout - (out * dout).sum())
    return out, (ds @ k) * scale, torch.logsumexp(score.float(), 0)


def _check_choice(q: Tensor, mean_ND: Tensor, chosen: list[int], first: int, own: int, slots: int) -> None:
    score = mean_ND[first:own] @ q.float()
    if len(set(chosen)) != len(chosen) or len(chosen) != min(slots, own - first):
        raise CheckFailed(f"the gate chose {sorted(chosen)} of the blocks {first}..{own - 1}")
    if any(not first <= b < own for b in chosen):
        raise CheckFailed(f"the gate chose {sorted(chosen)}, but only {first}..{own - 1} are past blocks")
    left = torch.ones_like(score, dtype=torch.bool)
    left[[b - first for b in chosen]] = False
    if chosen and bool(left.any()):
        gap = float(score[left].max() - score[~left].min())
        if gap > float(score.abs().max()) * 2.0**-SCORE_BITS:
            raise CheckFailed(f"the gate left out a block that scores {gap:.2e} higher than one it chose")


def _means(x: Inputs, table: BlockTable) -> Tensor:
    """fp32 mean key of every block [NB, Hkv, D], by summing over token runs."""
    total = torch.zeros((table.block_start.numel(), *x.k.shape[1:]), device=x.k.device)
    total.index_add_(0, table.own_block, x.k.detach().float())
    return total / table.block_len.clamp(min=1)[:, None, None]


def _keys(
    x: Inputs,
    ids: Tensor,
    table: BlockTable,
    out: Tensor,
    lse2: Tensor,
    dk: Tensor,
    dv: Tensor,
    g: torch.Generator,
) -> dict[str, float]:
    """dk and dv of sampled keys: exact p and ds from the checked lse, over all rows that see the key."""
    T, H, D = x.q.shape
    Hkv = x.k.shape[1]
    G, scale = H // Hkv, D**-0.5
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"dk": [], "dv": []}
    for _ in range(BLOCKS):
        t, kv = int(torch.randint(T, (1,), generator=g)), int(torch.randint(Hkv, (1,), generator=g))
        block = int(table.own_block[t])
        start, length = int(table.block_start[block]), int(table.block_len[block])
        key = start + torch.randint(length, (KEYS,), generator=g).to(x.k.device)
        heads = slice(kv * G, kv * G + G)
        inside = torch.zeros(T, dtype=torch.bool, device=x.k.device)
        inside[start : start + length] = True
        sees = (ids[:, heads] == block).any(-1) | inside[:, None]
        token, head = sees.nonzero(as_tuple=True)
        total = torch.zeros((2, 2, KEYS, D), device=x.k.device)
        for a in range(0, len(token), _ROWS):
            t_, h_ = token[a : a + _ROWS], head[a : a + _ROWS] + kv * G
            hidden = inside[t_][:, None] & (key[None, :] > t_[:, None])
            for i, dtype in enumerate((torch.float32, x.q.dtype)):
                total[i] += _key_part(x, t_, h_, key, kv, out, lse2, hidden, scale, dtype)
        for i in range(KEYS):
            rows["dk"].append((dk[key[i], kv], total[0, 0, i], total[1, 0, i]))
            rows["dv"].append((dv[key[i], kv], total[0, 1, i], total[1, 1, i]))
    return {name: _compare(name, x, samples) for name, samples in rows.items()}


def _key_part(
    x: Inputs,
    token: Tensor,
    head: Tensor,
    key: Tensor,
    kv: int,
    out: Tensor,
    lse2: Tensor,
    hidden: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """dk, dv [2, KEYS, D] from some query rows; products in `dtype`, sums over rows in fp32."""
    q, dout = x.q.detach()[token, head].to(dtype), x.dout[token, head].to(dtype)
    k, v = x.k.detach()[key, kv].to(dtype), x.v.detach()[key, kv].to(dtype)
    lse = lse2[token, head] * math.log(2)
    delta = (out[token, head].float() * dout.float()).sum(-1)
    p = torch.exp((q @ k.T).float() * scale - lse[:, None]).masked_fill(hidden, 0)
    ds = p * ((dout @ v.T).float() - delta[:, None])
    return torch.stack([(ds.to(dtype).T @ q).float() * scale, (p.to(dtype).T @ dout).float()])


def _compare(name: str, x: Inputs, samples: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    actual, exact, rough = (torch.stack([s[i].float() for s in samples]) for i in range(3))
    norm = exact.norm()
    error, allowed = float((actual - exact).norm() / norm), ERROR_RATIO * float((rough - exact).norm() / norm)
    if not error <= max(allowed, 1e-3):  # a NaN fails
        raise CheckFailed(f"{x.shape}: {name} has relative error {error:.2e}, allowed {allowed:.2e}")
    return error
