"""What MoBA's gate chose, by counting alone: cheap enough to be asked while a model trains.

Unlike `eval.gate` nothing is compared with full attention, and rows may be packed documents. All sums are additive
over rows, heads and processes.

Shape legend: T tokens, H query heads, K listed past blocks, NB blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.moba.blocks import BlockTable, build_block_table
from model.schedule import LayerPlan

COLUMNS = ("choices", "blocks_back", "nearest", "never", "possible", "entropy", "load_max", "heads")
_TOKENS = 1 << 16  # counted at a time


@dataclass
class GateLoad:
    """Sums over what `probe` saw. Give it to a model as its probe, with the borders of the row that is run.

    Attributes:
        plans: one per layer; layers without MoBA stay at zero.
        table: float64 [layers, 8] on the device, in the order of COLUMNS; may be summed by an all-reduce.
        cu_seqlens: int32 [N + 1], of the row that runs next.
    """

    plans: tuple[LayerPlan, ...]
    table: Tensor
    cu_seqlens: Tensor

    @classmethod
    def zeros(cls, plans: tuple[LayerPlan, ...], device: torch.device | str) -> GateLoad:
        table = torch.zeros(len(plans), len(COLUMNS), dtype=torch.float64, device=device)
        return cls(plans, table, torch.zeros(2, dtype=torch.int32, device=device))

    @torch.no_grad()
    def probe(self, layer: int, q_THD: Tensor, k_THD: Tensor, block_ids: Tensor) -> None:
        """Count the choices int32 [T, H, K] of one layer. Never waits for the device."""
        T, H, _ = block_ids.shape
        blocks = build_block_table(self.cu_seqlens, T, self.plans[layer].block_size)
        sums = self.table[layer]
        load_HN = torch.zeros(H, blocks.block_start.numel() + 1, dtype=torch.float64, device=block_ids.device)
        for t in range(0, T, _TOKENS):
            ids = block_ids[t : t + _TOKENS].long()
            back = (blocks.own_block[t : t + _TOKENS, None, None] - ids).masked_fill(ids < 0, 0)
            sums[:3] += torch.stack([(ids >= 0).sum(), back.sum(), (back == 1).sum()])
            into = torch.where(ids >= 0, ids, load_HN.shape[1] - 1).transpose(0, 1).flatten(1)
            load_HN.scatter_add_(1, into, torch.ones_like(into, dtype=torch.float64))
        load_HN = load_HN[:, :-1]
        possible_N = _possible(blocks)
        number = possible_N.sum().clamp(min=1)
        total_H = load_HN.sum(1).clamp(min=1)
        share = load_HN / total_H[:, None]
        entropy = -(share * share.clamp(min=1e-30).log()).sum() / number.log().clamp(min=math.log(2))
        never = ((load_HN == 0) & (possible_N > 0)).sum()
        load_max = (load_HN.amax(1) * number / total_H).sum()
        sums[3:] += torch.stack([never, possible_N.sum() * H, entropy, load_max, torch.full_like(entropy, H)])

    def report(self) -> dict[str, list[float | None]]:
        """By layer, None where there is no MoBA or no choice to make. Waits for the device.

        `blocks_back`: mean distance of a chosen block. `nearest`: share of choices that fell on the block just
        before the own one. `never`: share of blocks nobody chose although somebody could. `entropy`: of the
        choices over the blocks, 1 is uniform. `load_max`: choices of the most chosen block over the mean.
        """
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.table.tolist()]
        return {
            name: [row[name] / row[per] if row["choices"] else None for row in rows]
            for name, per in (
                ("blocks_back", "choices"),
                ("nearest", "choices"),
                ("never", "possible"),
                ("entropy", "heads"),
                ("load_max", "heads"),
            )
        }


def _possible(blocks: BlockTable) -> Tensor:
    """float64 [NB]: 1 for blocks that are some token's past. Found from tokens that start a block's successor."""
    size = blocks.block_start.numel()
    later = blocks.own_block > blocks.first_block
    before = torch.where(later, blocks.own_block - 1, size).long()
    marks = torch.zeros(size + 1, dtype=torch.float64, device=before.device)
    return marks.scatter_(0, before, 1.0)[:-1]
