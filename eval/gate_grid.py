"""What the gate would keep of full attention for every (block_size, topk) of a grid, on weights as they are.

The model runs under full attention and each layer's queries and keys are looked at. Blocks are scored as
MoBA's gate does (MoBA paper, section 2.2), and the share of full attention's mass in the chosen blocks is
measured: block size and topk can be chosen before any training.

Shape legend: T tokens of one document, H query heads, Hkv kv heads, D head_dim, N blocks, Q queries compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.validate_stage import BLOCK_MULTIPLE
from data.batch import Batch
from eval.gate import WORKSPACE_BYTES
from model.schedule import LayerPlan
from model.transformer import CausalLM

Cell = tuple[int, int]  # block_size, topk


def grid_cells(seq_len: int, block_sizes: Sequence[int], topks: Sequence[int]) -> list[Cell]:
    """Cells with something to choose: more blocks than topk. No sizes: an eighth of the length down to a 64th."""
    sizes = list(block_sizes) or [seq_len // n // BLOCK_MULTIPLE * BLOCK_MULTIPLE for n in (8, 16, 32, 64)]
    sizes = sorted({size for size in sizes if size >= BLOCK_MULTIPLE}, reverse=True)
    return [(size, topk) for size in sizes for topk in sorted(set(topks)) if topk * size < seq_len]


@torch.no_grad()
def gate_grid(
    model: CausalLM, batch: Batch, block_sizes: Sequence[int], topks: Sequence[int], queries: int
) -> list[dict[str, Any]]:
    """One row for each cell, as JSON: what is read and what is kept, per layer and on average.

    Args:
        batch: one row that is one document, on the model's device.
        queries: so many queries, evenly spaced, are compared. A cell counts those that had to choose.

    Raises:
        ValueError: more than one document.
    """
    if batch.cu_seqlens.numel() != 2:
        raise ValueError("the gate is looked at on one document at a time")
    cells = grid_cells(batch.input_ids.shape[1], block_sizes, topks)
    layers: list[dict[Cell, list[float]]] = []

    def probe(layer: int, q_THD: Tensor, k_THD: Tensor, _ids: Tensor) -> None:
        layers.append(_layer(q_THD, k_THD, cells, queries))

    length = batch.input_ids.shape[1]
    # One block that holds the whole document is full attention, and unlike it has a gate to look at.
    whole = LayerPlan("moba", -(-length // BLOCK_MULTIPLE) * BLOCK_MULTIPLE, 1)
    plans = (whole,) * model.config.num_layers
    model.hidden(batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, plans, probe=probe)
    rows = []
    for size, topk in cells:
        found = [layer[size, topk] for layer in layers]
        kept, best, window = ([values[i] for values in found] for i in range(3))
        rows.append(
            {
                "block_size": size,
                "topk": topk,
                "read": size * topk / length,  # of the keys that the last query could see
                "kept": sum(kept) / len(kept),
                "best": sum(best) / len(best),
                "window": sum(window) / len(window),
                "kept_by_layer": kept,
            }
        )
    return rows


def _layer(q_THD: Tensor, k_THD: Tensor, cells: Sequence[Cell], queries: int) -> dict[Cell, list[float]]:
    """Mean share of mass [kept, best, nearest] over heads and queries, by cell."""
    T, H, D = q_THD.shape
    Hkv = k_THD.shape[1]
    sums = {cell: torch.zeros(3, dtype=torch.float64, device=q_THD.device) for cell in cells}
    counts = dict.fromkeys(cells, 0)
    if not cells:
        return {}
    first = min(size * topk for size, topk in cells)
    picked = torch.linspace(first, T - 1, min(queries, T - first), device=q_THD.device).round().long().unique()
    means = {size: _means(k_THD, size) for size, _ in cells}
    for part in picked.split(max(1, WORKSPACE_BYTES // (3 * 4 * H * T))):
        q_QhGD = q_THD[part].float().view(part.numel(), Hkv, H // Hkv, D)
        score = torch.einsum("qhgd,thd->qhgt", q_QhGD, k_THD.float()).reshape(-1, H, T) * D**-0.5
        score.masked_fill_(torch.arange(T, device=part.device) > part[:, None, None], float("-inf"))
        probability = torch.softmax(score, -1)
        for size in means:
            mass = F.pad(probability, (0, -T % size)).unflatten(2, (-1, size)).sum(3)  # [Q, H, N]
            gate = torch.einsum("qhgd,nhd->qhgn", q_QhGD, means[size]).reshape(mass.shape)
            blocks, own = torch.arange(mass.shape[2], device=part.device), (part // size)[:, None, None]
            own_mass = mass.gather(2, own.expand(-1, H, 1))[..., 0]
            past = blocks < own
            order = gate.masked_fill(~past, float("-inf")).sort(dim=2, descending=True, stable=True).indices
            by_gate = torch.where(past, mass, 0.0).gather(2, order)
            by_mass = torch.where(past, mass, 0.0).sort(dim=2, descending=True).values
            for topk in (t for s, t in cells if s == size):
                asked = part >= size * topk
                near = torch.where(past & (blocks > own - topk), mass, 0.0).sum(2)
                shares = torch.stack([by_gate[..., : topk - 1].sum(2), by_mass[..., : topk - 1].sum(2), near])
                sums[size, topk] += (shares + own_mass)[:, asked].double().mean(2).sum(1)
                counts[size, topk] += int(asked.sum())
    return {cell: (sums[cell] / max(counts[cell], 1)).tolist() for cell in cells}


def _means(k_THD: Tensor, size: int) -> Tensor:
    """fp32 [N, Hkv, D]: means of the keys of each block, the last one of what there is."""
    T = k_THD.shape[0]
    padded = F.pad(k_THD.float(), (0, 0, 0, 0, 0, -T % size)).unflatten(0, (-1, size)).sum(1)
    tokens = torch.full((padded.shape[0],), size, device=k_THD.device)
    tokens[-1] = T - size * (padded.shape[0] - 1)
    return padded / tokens[:, None, None]
