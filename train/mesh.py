"""Which rank does what: data-parallel x sequence-parallel groups over one flat world.

Consecutive ranks form a sequence-parallel group, so that its traffic stays inside a node. DeepSpeed is told
nothing of it: it sees `world` plain data-parallel ranks, and the loss scale (`train.loop`) does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from data.batch import Batch


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `world = dp_world * sp_world`; `rank = dp_rank * sp_world + sp_rank`."""

    rank: int
    world: int
    sp_world: int
    device: torch.device
    sp_group: dist.ProcessGroup | None  # None where a group would hold this rank alone

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_world

    @property
    def dp_world(self) -> int:
        return self.world // self.sp_world

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp_world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def cut(self, batch: Batch) -> Batch:
        """This rank's columns of a batch, as views: [R, S / sp_world] of ids, labels, positions and weights.

        Documents may straddle the cut; `cu_seqlens` and `max_seqlen` stay those of whole rows. Labels were
        shifted before, so no rank needs its neighbour's tokens.
        """
        if self.sp_world == 1:
            return batch
        seq_len = batch.input_ids.shape[1]
        if seq_len % self.sp_world:
            raise ValueError(f"rows of {seq_len} tokens do not divide into {self.sp_world} equal shards")
        width = seq_len // self.sp_world
        columns = slice(self.sp_rank * width, (self.sp_rank + 1) * width)
        return replace(
            batch,
            input_ids=batch.input_ids[:, columns],
            labels=batch.labels[:, columns],
            positions=batch.positions[:, columns],
            weights=None if batch.weights is None else batch.weights[:, columns],
        )

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, a small plain object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, a small plain object, in rank order, on every rank."""
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        dist.barrier()


def build_mesh(sequence_parallel: int, device: torch.device) -> Mesh:
    """Create the groups. Every rank must call this: creating a group is collective for the whole world."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world % sequence_parallel:
        raise ValueError(f"{world} ranks do not divide into sequence-parallel groups of {sequence_parallel}")
    group = None
    if sequence_parallel > 1:
        starts = range(0, world, sequence_parallel)
        groups = [dist.new_group(list(range(start, start + sequence_parallel))) for start in starts]
        group = groups[rank // sequence_parallel]
    return Mesh(rank, world, sequence_parallel, device, group)
