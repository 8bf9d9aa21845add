"""Ranks and groups."""

from __future__ import annotations

import pytest
import torch

from tests.gloo import GlooPool
from train.mesh import Mesh, build_mesh


@pytest.mark.parametrize(
    ("rank", "sp_world", "dp_rank", "dp_world", "sp_rank"), [(5, 1, 5, 8, 0), (5, 2, 2, 4, 1), (5, 4, 1, 2, 1)]
)
def test_consecutive_ranks_form_a_sequence_group(
    rank: int, sp_world: int, dp_rank: int, dp_world: int, sp_rank: int
) -> None:
    mesh = Mesh(rank, 8, sp_world, torch.device("cpu"), None)
    assert (mesh.dp_rank, mesh.dp_world, mesh.sp_rank) == (dp_rank, dp_world, sp_rank)
    assert mesh.rank == mesh.dp_rank * mesh.sp_world + mesh.sp_rank


def sum_over_group(sequence_parallel: int) -> tuple[int, bool, str]:
    mesh = build_mesh(sequence_parallel, torch.device("cpu"))
    value = torch.tensor(mesh.rank + 1)
    if mesh.sp_group is not None:
        torch.distributed.all_reduce(value, group=mesh.sp_group)
    return int(value), mesh.is_main, mesh.broadcast(f"from {mesh.rank}")


def test_groups_reduce_and_rank_0_speaks(pool2: GlooPool) -> None:
    assert pool2(sum_over_group, 2) == [(3, True, "from 0"), (3, False, "from 0")]
    assert pool2(sum_over_group, 1) == [(1, True, "from 0"), (2, False, "from 0")]
