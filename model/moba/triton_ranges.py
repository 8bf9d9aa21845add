# mypy: disable-error-code="no-untyped-def"
"""The parts of lists that belong to a run of tokens.

Shape legend: triton_common.py; lists: triton_lists.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.moba import triton_common as common


@triton.jit(do_not_specialize=["total_lists", "first_row", "end_row", "steps"])
def _range_kernel(
    row_ptr, offset_ptr, count_ptr, out_offset_ptr, out_count_ptr, total_lists, first_row, end_row, steps,
    PIECE: tl.constexpr,
):  # fmt: skip
    """The part of every list with first_row <= row id < end_row. Row ids of a list ascend by token."""
    lists = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    live = lists < total_lists
    offset = tl.load(offset_ptr + lists, mask=live, other=0)
    count = tl.load(count_ptr + lists, mask=live, other=0)
    begin = _lower_bound(row_ptr, offset, count, first_row, steps)
    end = _lower_bound(row_ptr, offset, count, end_row, steps)
    tl.store(out_offset_ptr + lists, begin, mask=live)
    tl.store(out_count_ptr + lists, end - begin, mask=live)


@triton.jit
def _lower_bound(row_ptr, offset, count, value, steps):
    low = offset
    high = offset + count
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        below = (tl.load(row_ptr + middle, mask=low < high, other=0) < value) & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below | (low >= high), high, middle)
    return low


def select(
    row: Tensor, whole: dict[str, Tensor], part: dict[str, Tensor], first_row: int, end_row: int, longest: int
) -> None:
    """offset and count of the part of every list with first_row <= row id < end_row."""
    total = whole["count"].numel()
    _range_kernel[(common.ceil_div(total, 128),)](
        row,
        whole["offset"],
        whole["count"],
        part["offset"],
        part["count"],
        total,
        first_row,
        end_row,
        (longest + 1).bit_length() + 1,
        PIECE=128,
        num_warps=4,
    )
