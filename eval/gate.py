"""Which blocks the queries of a long document choose, and how much of full attention those blocks hold.

A probe sees the queries, keys and chosen blocks of every MoBA layer while the model runs under its MoBA plan
(gate: MoBA paper, section 2.2). Nothing of a layer is kept but its statistics.

Shape legend: T tokens of one document, H query heads, Hkv kv heads, G = H / Hkv, D head_dim, N blocks of the
document, M bins of the picture, Q queries compared with full attention.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from eval.files import write_atomic
from model.schedule import LayerPlan
from model.transformer import CausalLM

MAX_BINS = 64  # of the picture, per axis
WORKSPACE_BYTES = 256 << 20  # attention scores of one chunk of queries


@dataclass(frozen=True)
class LayerGate:
    """Statistics of one MoBA layer. All lists are per query head unless said otherwise.

    Attributes:
        choice: fp32 [H, M, M], share of the queries of a bin (row) that chose a block of a bin (column), own
            block included; rows are query blocks and columns key blocks, pooled to at most 64 bins.
        mass_kept: share of full attention's mass that lies in the chosen blocks and the own block, mean over
            queries that have more blocks than they may choose.
        mass_best: the same for the best blocks there were (own block included), the most any gate could hold.
        mass_window: the same for the nearest blocks, a sliding window of equal cost.
        mass_own: the same for the own block alone.
        distance: share of choices at a distance of 1, 2, ... blocks, mean over heads.
        entropy: of the distribution of choices over blocks, divided by its maximum: 1 is uniform.
        never: share of blocks that nobody chose although somebody could.
        load_max: load of the most chosen block, relative to the mean load.
        agreement: mean overlap (Jaccard) of the choices of two heads that share keys; None without groups.
        queries: how many queries the masses were measured on; 0: the document has too few blocks.
    """

    layer: int
    block_size: int
    topk: int
    choice: Tensor
    mass_kept: list[float]
    mass_best: list[float]
    mass_window: list[float]
    mass_own: list[float]
    distance: list[float]
    entropy: list[float]
    never: list[float]
    load_max: list[float]
    agreement: float | None
    queries: int

    def to_json(self) -> dict[str, Any]:
        """Everything but the picture."""
        return {name: value for name, value in vars(self).items() if name != "choice"}


def save_gates(path: Path, gates: Sequence[LayerGate]) -> None:
    """Write the pictures (`choice`) as a compressed .npz of fp16 arrays; the rest goes into JSON."""
    pictures: dict[str, Any] = {str(gate.layer): gate.choice.numpy().astype(np.float16) for gate in gates}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **pictures)
    write_atomic(path, buffer.getvalue())


def read_gates(path: Path, layers: Sequence[dict[str, Any]]) -> list[LayerGate]:
    """The gates behind `to_json` objects and the pictures saved beside them; none without the pictures."""
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as pictures:
        return [
            LayerGate(choice=torch.from_numpy(pictures[str(layer["layer"])].astype(np.float32)), **layer)
            for layer in layers
        ]


@torch.no_grad()
def gate_statistics(model: CausalLM, batch: Batch, plans: Sequence[LayerPlan], queries: int) -> list[LayerGate]:
    """Run one document through the model and look at the gate of each MoBA layer.

    Args:
        batch: a single row that is a single document, on the model's device.
        plans: one per layer; layers that are full there have no gate and are left out.
        queries: so many queries, evenly spaced, are compared with full attention.

    Raises:
        ValueError: more than one document.
    """
    if batch.cu_seqlens.numel() != 2:
        raise ValueError("the gate is looked at on one document at a time")
    found: list[LayerGate] = []

    def probe(layer: int, q_THD: Tensor, k_THD: Tensor, block_ids: Tensor) -> None:
        found.append(_layer(layer, plans[layer], q_THD, k_THD, block_ids, queries))

    model.hidden(batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, plans, probe=probe)
    return found


def _layer(
    layer: int, layer_plan: LayerPlan, q_THD: Tensor, k_THD: Tensor, block_ids: Tensor, queries: int
) -> LayerGate:
    block_size, topk = layer_plan.block_size, layer_plan.topk
    T = q_THD.shape[0]
    num_blocks = -(-T // block_size)
    own_T = torch.arange(T, device=q_THD.device) // block_size
    chosen_HNN = _choice_counts(block_ids.long(), own_T, num_blocks)
    load_HN = chosen_HNN.sum(1)
    total = load_HN.sum(1, keepdim=True).clamp(min=1)
    possible = max(num_blocks - 1, 1)  # the last block is nobody's past
    share = load_HN / total
    entropy = -(share * share.clamp(min=1e-30).log()).sum(1)
    entropy = entropy / math.log(possible) if possible > 1 else torch.ones_like(entropy)
    masses, used = _masses(q_THD, k_THD, block_ids, own_T, block_size, topk, queries)
    return LayerGate(
        layer=layer,
        block_size=block_size,
        topk=topk,
        choice=_pooled(chosen_HNN, own_T, num_blocks).float().cpu(),
        mass_kept=masses[0],
        mass_best=masses[1],
        mass_window=masses[2],
        mass_own=masses[3],
        distance=_distances(chosen_HNN),
        entropy=entropy.tolist(),
        never=((load_HN[:, :possible] == 0).double().mean(1)).tolist() if num_blocks > 1 else [],
        load_max=(load_HN.amax(1) / (total[:, 0] / possible)).tolist(),
        agreement=_agreement(block_ids, own_T, num_blocks, k_THD.shape[1]),
        queries=used,
    )


def _choice_counts(block_ids_THK: Tensor, own_T: Tensor, num_blocks: int) -> Tensor:
    """float64 [H, N, N]: queries of a block (row) that chose a past block (column)."""
    _, H, K = block_ids_THK.shape
    head = torch.arange(H, device=own_T.device)[None, :, None]
    cell = (head * num_blocks + own_T[:, None, None]) * num_blocks + block_ids_THK
    cells = H * num_blocks * num_blocks
    cell = torch.where(block_ids_THK >= 0, cell, cells).reshape(-1)
    counts = torch.bincount(cell, minlength=cells + 1)[:cells] if K else cell.new_zeros(cells)
    return counts.view(H, num_blocks, num_blocks).double()


def _pooled(chosen_HNN: Tensor, own_T: Tensor, num_blocks: int) -> Tensor:
    """Choices and own blocks as shares of the queries of each bin, [H, M, M]."""
    H, bins = chosen_HNN.shape[0], min(num_blocks, MAX_BINS)
    bin_N = torch.arange(num_blocks, device=own_T.device) * bins // num_blocks
    queries_N = torch.bincount(own_T, minlength=num_blocks).double()
    with_own = chosen_HNN + torch.diag(queries_N)
    rows = torch.zeros(H, bins, num_blocks, dtype=torch.float64, device=own_T.device).index_add_(
        1, bin_N, with_own
    )
    cells = torch.zeros(H, bins, bins, dtype=torch.float64, device=own_T.device).index_add_(2, bin_N, rows)
    queries_M = torch.zeros(bins, dtype=torch.float64, device=own_T.device).index_add_(0, bin_N, queries_N)
    width_M = torch.bincount(bin_N, minlength=bins)
    return cells / queries_M[None, :, None] / width_M[None, None, :]


def _distances(chosen_HNN: Tensor) -> list[float]:
    counts = chosen_HNN.sum(0)
    by_distance = torch.stack(
        [counts.diagonal(-d).sum() for d in range(1, counts.shape[0])] or [counts.new_zeros(())]
    )
    return (by_distance / by_distance.sum().clamp(min=1)).tolist()


def _masses(
    q_THD: Tensor, k_THD: Tensor, block_ids: Tensor, own_T: Tensor, block_size: int, topk: int, queries: int
) -> tuple[list[list[float]], int]:
    """Mean shares of full attention's mass [kept, best, window, own], each per head, and the queries used."""
    T, H, _ = q_THD.shape
    first = topk * block_size  # from here on a query has more blocks than it may attend to
    if first >= T:
        return [[], [], [], []], 0
    picked = torch.linspace(first, T - 1, min(queries, T - first), device=q_THD.device).round().long().unique()
    step = max(1, WORKSPACE_BYTES // (3 * 4 * H * T))
    sums = torch.zeros(4, H, dtype=torch.float64, device=q_THD.device)
    for part in picked.split(step):
        mass = _block_mass(q_THD[part].float(), k_THD.float(), part, block_size)  # [Q, H, N]
        blocks, own = torch.arange(mass.shape[2], device=part.device), own_T[part, None, None]
        own_mass = mass.gather(2, own.expand(-1, H, 1))[..., 0]
        ids = block_ids[part].long()
        chosen = torch.where(ids >= 0, mass.gather(2, ids.clamp(min=0)), 0.0).sum(2)
        past = torch.where(blocks < own, mass, 0.0)
        best = past.topk(topk - 1, dim=2).values.sum(2)
        window = torch.where((blocks < own) & (blocks > own - topk), mass, 0.0).sum(2)
        shares = torch.stack([chosen + own_mass, best + own_mass, window + own_mass, own_mass])
        sums += shares.double().sum(1)
    return (sums / picked.numel()).tolist(), picked.numel()


def _block_mass(q_QHD: Tensor, k_THD: Tensor, at_Q: Tensor, block_size: int) -> Tensor:
    """Full causal attention's probabilities summed over blocks, fp32 [Q, H, N]."""
    Q, H, D = q_QHD.shape
    T, Hkv, _ = k_THD.shape
    score = torch.einsum("qhgd,thd->qhgt", q_QHD.view(Q, Hkv, H // Hkv, D), k_THD).reshape(Q, H, T) * D**-0.5
    score.masked_fill_(torch.arange(T, device=at_Q.device) > at_Q[:, None, None], float("-inf"))
    probability = torch.softmax(score, -1)
    padded = torch.nn.functional.pad(probability, (0, -T % block_size))
    return padded.unflatten(2, (-1, block_size)).sum(3)


def _agreement(block_ids: Tensor, own_T: Tensor, num_blocks: int, num_kv_heads: int) -> float | None:
    """Mean Jaccard overlap of two heads of a group, over queries with more past blocks than they may choose."""
    _, H, K = block_ids.shape
    group = H // num_kv_heads
    rows = (own_T > K).nonzero()[:, 0]
    if group < 2 or K == 0 or rows.numel() == 0:
        return None
    rows = rows[:: max(1, rows.numel() // 1024)]
    hot = torch.zeros(rows.numel(), H, num_blocks, device=block_ids.device).scatter_(
        2, block_ids[rows].long().clamp(min=0), 1.0
    )
    hot = hot.unflatten(1, (num_kv_heads, group))
    common = torch.einsum("rhan,rhbn->rhab", hot, hot)
    overlap = common / (2 * K - common)  # every head chooses K blocks here
    off_diagonal = ~torch.eye(group, dtype=torch.bool, device=common.device)
    return float(overlap[..., off_diagonal].mean())
