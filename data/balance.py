"""Sharing out the rows of one global batch so that the ranks need about the same time."""

from __future__ import annotations

from collections.abc import Sequence


def deal(costs: Sequence[float], world: int, micro_batch: int) -> list[list[int]]:
    """Rows by rank, in the order of its micro-batches.

    Rows are sorted by cost, so that the ranks' n-th micro-batches are alike (ranks wait for each other there under
    ZeRO-3); within one such group each row goes to the rank that has least so far. A permutation of the rows that
    depends on nothing but the arguments. `len(costs)` is a multiple of world * micro_batch.
    """
    dealt: list[list[int]] = [[] for _ in range(world)]
    total = [0.0] * world
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    for start in range(0, len(order), world * micro_batch):
        limit = len(dealt[0]) + micro_batch
        for row in order[start : start + world * micro_batch]:
            rank = min((r for r in range(world) if len(dealt[r]) < limit), key=lambda r: (total[r], r))
            dealt[rank].append(row)
            total[rank] += costs[row]
    return dealt
