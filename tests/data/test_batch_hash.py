import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch
from data.batch_hash import as_signed, as_text, rows_hash

ROWS = st.lists(st.lists(st.integers(0, 2**31), min_size=3, max_size=3), min_size=1, max_size=8)


def batch_of(rows: list[list[int]]) -> Batch:
    ids = torch.tensor(rows)
    return Batch(ids, ids, torch.arange(3).expand_as(ids), torch.arange(0, ids.numel() + 1, 3), 3)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, cut=st.integers(0, 8), order=st.randoms())
def test_the_hash_does_not_see_how_rows_are_shared(rows: list[list[int]], cut: int, order: object) -> None:
    whole = rows_hash([batch_of(rows)])
    mixed = sorted(rows, key=lambda _: order.random())  # type: ignore[attr-defined]
    parts = [part for part in (mixed[:cut], mixed[cut:]) if part]
    # as over ranks: signed sums that wrap, in an int64 tensor
    summed = torch.tensor([as_signed(rows_hash([batch_of(part)])) for part in parts], dtype=torch.int64).sum()
    assert as_text(int(summed)) == as_text(whole) == f"{whole:016x}"


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, place=st.integers(0, 7), column=st.integers(0, 2))
def test_the_hash_sees_every_change(rows: list[list[int]], place: int, column: int) -> None:
    whole, place = rows_hash([batch_of(rows)]), place % len(rows)
    changed = [list(row) for row in rows]
    changed[place][column] += 1
    assert rows_hash([batch_of(changed)]) != whole
    assert rows_hash([batch_of([*rows, rows[place]])]) != whole
