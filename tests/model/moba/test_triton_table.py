"""The two-kernel block table equals the plain one."""

import dataclasses

import pytest
import torch

from model.moba.blocks import build_block_table
from tests.model.moba.cases import borders

pytest.importorskip("triton")
from model.moba import triton_common, triton_table


@pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")
@pytest.mark.parametrize(
    "lengths", [[100], [0, 1, 15, 16, 17], [48, 0, 0, 87, 3], [16, 32], [1] * 5, [5, 2000, 3], [0, 7, 0]]
)
@pytest.mark.parametrize("block_size", [16, 48])
def test_equals_the_plain_table(lengths, block_size):
    plain = build_block_table(borders(lengths), sum(lengths), block_size)
    fast = triton_table.build(borders(lengths), sum(lengths), block_size)
    for field in dataclasses.fields(plain):
        a, b = getattr(plain, field.name), getattr(fast, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
