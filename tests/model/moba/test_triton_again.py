"""The gate for listed rows, in Triton's interpreter: the same blocks as the gate, in those rows and no others."""

import pytest
import torch

pytest.importorskip("triton")
from model.moba import triton_common
from model.moba.blocks import build_block_table
from tests.model.moba.cases import borders

pytestmark = pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")

from model.moba import triton_again, triton_gate  # noqa: E402
from model.moba.triton_pool import block_means  # noqa: E402

LENGTHS, BLOCK_SIZE, PAST = [37, 150, 3], 4, 3


def test_listed_rows_and_no_others(monkeypatch):
    monkeypatch.setattr(triton_again, "_TILE", triton_common.Tile(rows=32, keys=16, warps=4, stages=1))
    monkeypatch.setattr(triton_again, "_PROGRAMS", 4)
    g = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    q, k = torch.randn(tokens, 4, 16, generator=g), torch.randn(tokens, 2, 16, generator=g)
    table = build_block_table(borders(LENGTHS), tokens, BLOCK_SIZE)
    expected = triton_gate.choose(q, k, table, PAST)

    listed = triton_again.Listed.none(2, tokens * 2, q.device)
    chosen = torch.zeros(tokens * 4, dtype=torch.bool)
    for head in range(2):  # more rows than one program takes at a time, in any order
        token = torch.randperm(tokens, generator=g)[:140]
        row = (token * 4 + head * 2 + torch.randint(0, 2, (140,), generator=g)).int()
        listed.row[head, :140], listed.count[head] = row, 140
        chosen[row.long()] = True
    ids = torch.full((tokens, 4, PAST), -7, dtype=torch.int32)
    triton_again.choose(q, block_means(k, table), table, listed, ids)
    done, wanted = ids.view(-1, PAST).sort(-1).values, expected.view(-1, PAST).sort(-1).values
    assert torch.equal(done[chosen], wanted[chosen])
    assert (done[~chosen] == -7).all()
