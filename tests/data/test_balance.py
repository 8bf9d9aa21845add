from hypothesis import given, settings
from hypothesis import strategies as st

from data.balance import deal


@settings(deadline=None, max_examples=100)
@given(world=st.integers(1, 6), micro=st.integers(1, 4), steps=st.integers(1, 5), rnd=st.randoms())
def test_every_row_is_dealt_once_and_evenly(world: int, micro: int, steps: int, rnd: object) -> None:
    costs = [rnd.randint(1, 1000) for _ in range(world * micro * steps)]  # type: ignore[attr-defined]
    dealt = deal(costs, world, micro)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))
    assert {len(rows) for rows in dealt} == {micro * steps}
    # no rank has more over another than the costliest row: one row is all that the greedy choice can err by
    totals = [sum(costs[row] for row in rows) for rows in dealt]
    assert max(totals) - min(totals) <= max(costs) * micro


def test_ranks_get_rows_of_like_cost_at_a_time() -> None:
    costs = [9, 1, 8, 1, 2, 7, 2, 10]
    assert deal(costs, 2, 1) == [[7, 5, 4, 1], [0, 2, 6, 3]]
    in_order = [sum(costs[:4]), sum(costs[4:])]
    balanced = [sum(costs[row] for row in rows) for rows in deal(costs, 2, 1)]
    assert max(balanced) < max(in_order)


def test_one_long_row_among_short_ones() -> None:
    """A long document beside rows of short ones: the ranks' sums are as near as whole rows allow."""
    costs = [100] + [1] * 7
    dealt = deal(costs, 2, 2)
    assert sum(len(rows) for rows in dealt) == 8
    assert 0 in dealt[0][:1]
