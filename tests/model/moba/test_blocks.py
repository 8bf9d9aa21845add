import pytest
import torch

from model.moba.blocks import build_block_table, full_block_rows
from tests.model.moba.cases import borders

CASES = [[1], [15], [16], [17], [64, 1, 31, 32, 33], [0, 20, 0, 16, 0], [5, 5, 5]]


@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_tables_against_a_loop(lengths: list[int]) -> None:
    size, cu = 16, borders(lengths)
    table = build_block_table(cu, int(cu[-1]), size)
    own, first, start, blocks = [], [], [], []
    for doc, length in enumerate(lengths):
        base = int(cu[doc])
        doc_first = len(blocks)
        for i in range(length):
            own.append(doc_first + i // size)
            first.append(doc_first)
            start.append(base + i // size * size)
        blocks += [(base + i, min(size, length - i)) for i in range(0, length, size)]
    unused = table.block_start.numel() - len(blocks)
    full = [i for i, (_, length) in enumerate(blocks) if length == size]
    assert table.own_block.tolist() == own
    assert table.first_block.tolist() == first
    assert table.own_start.tolist() == start
    assert table.block_start.tolist() == [b for b, _ in blocks] + [int(cu[-1])] * unused
    assert table.block_len.tolist() == [n for _, n in blocks] + [0] * unused
    assert [i for i in table.full_id.tolist() if i >= 0] == full
    assert [i for i, r in enumerate(table.full_rank.tolist()) if r >= 0] == full
    assert [table.full_rank[i] for i in full] == list(range(len(full)))
    rows = full_block_rows(table, 0, len(full))
    assert rows.tolist() == [list(range(blocks[i][0], blocks[i][0] + size)) for i in full]


def test_sizes_and_dtypes_come_from_shapes_alone() -> None:
    a, b = (build_block_table(borders(x), 96, 16) for x in ([96, 0, 0], [31, 33, 32]))
    for name in ("own_block", "first_block", "own_start", "block_start", "block_len", "full_id", "full_rank"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int32, name


def test_most_past_blocks() -> None:
    assert [build_block_table(borders([n]), n, 16).max_past for n in (1, 16, 17, 32, 33)] == [0, 0, 1, 1, 2]
