"""The correctness gate of `moba bench generate`: no pass, no number.

Sampled queries are computed from the definition, in fp32. Together they may err at most twice as much as the same
computation written with torch operations in the dtype of the inputs.

Shape legend: M queries, the last of N keys of one row; H query heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.schedule import LayerPlan

SAMPLES = 24  # (query, head) pairs
ERROR_RATIO = 2.0
FLOOR = 1e-3  # relative error that always passes
SCORE_BITS = 12  # choices between scores closer than 2^-12 of the largest are left to the kernels: not sampled


class CheckFailed(RuntimeError):
    """Wrong results; nothing is timed."""


def check_queries(
    what: str, q_MHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, out_MHD: Tensor, plan: LayerPlan
) -> float:
    """The relative error of `out_MHD` on samples, the last query among them.

    Raises:
        CheckFailed: too large, or not a number.
    """
    M, H, D = q_MHD.shape
    group, before = H // k_NHD.shape[1], k_NHD.shape[0] - M
    g = torch.Generator().manual_seed(0)
    places = [M - 1, *torch.randint(M, (4 * SAMPLES,), generator=g).tolist()]
    heads = torch.randint(H, (len(places),), generator=g).tolist()
    actual, exact, rough = [], [], []
    for place, head in zip(places, heads, strict=True):
        q, kv = q_MHD[place, head], head // group
        keys = _keys(q, k_NHD[:, kv], before + place, plan)
        if keys is None:
            continue
        k, v = k_NHD[keys, kv], v_NHD[keys, kv]
        actual.append(out_MHD[place, head].float())
        exact.append(_attend(q.float(), k.float(), v.float(), D))
        rough.append(_attend(q, k, v, D).float())
        if len(exact) == SAMPLES:
            break
    if not exact:
        raise CheckFailed(f"{what}: no query whose blocks are beyond doubt")
    return compare(what, torch.stack(actual), torch.stack(exact), torch.stack(rough))


def compare(what: str, actual: Tensor, exact: Tensor, rough: Tensor) -> float:
    """The relative error of `actual`; raises CheckFailed if it exceeds twice that of `rough`."""
    error, other = (float((x.float() - exact).norm() / exact.norm()) for x in (actual, rough))
    if not error <= max(ERROR_RATIO * other, FLOOR):  # a NaN fails
        raise CheckFailed(f"{what}: relative error {error:.2e}, that of plain operations {other:.2e}")
    return error


def _keys(q_D: Tensor, k_ND: Tensor, place: int, plan: LayerPlan) -> Tensor | None:
    """Tokens the query at `place` of its row attends to; None where rounding could decide otherwise."""
    device = q_D.device
    if plan.kind == "full":
        return torch.arange(place + 1, device=device)
    own, num_past = place // plan.block_size, plan.topk - 1
    blocks = torch.arange(own, device=device)
    if own > num_past:
        means = k_ND[: own * plan.block_size].view(own, plan.block_size, -1).mean(1, dtype=torch.float32)
        score = means @ q_D.float()
        best = score.sort(descending=True)
        gap = best.values[num_past - 1] - best.values[num_past] if num_past else torch.ones(())
        if float(gap) < float(score.abs().max()) * 2.0**-SCORE_BITS:
            return None
        blocks = best.indices[:num_past]
    inside = torch.arange(plan.block_size, device=device)
    past = (blocks[:, None] * plan.block_size + inside).flatten()
    return torch.cat([past, torch.arange(own * plan.block_size, place + 1, device=device)])


def _attend(q_D: Tensor, k_ND: Tensor, v_ND: Tensor, dim: int) -> Tensor:
    return torch.softmax((k_ND @ q_D) * dim**-0.5, 0) @ v_ND
