from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shuffle import key_of, permute


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 600), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_depends_on_the_key_and_mixes() -> None:
    a, b = ([permute(i, 1000, key) for i in range(1000)] for key in (1, 2))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 20
    assert sum(abs(x - y) <= 1 for x, y in pairwise(a)) < 20  # neighbours are torn apart
    thirds = [sum(x < 333 for x in a[start : start + 250]) for start in range(0, 1000, 250)]
    assert min(thirds) > 50  # no part of the range is left for the end


def test_permute_of_a_huge_range_is_cheap_and_in_range() -> None:
    images = {permute(i, 10**15 + 7, 3) for i in range(1000)}
    assert len(images) == 1000 and max(images) < 10**15 + 7


def test_index_out_of_range() -> None:
    with pytest.raises(IndexError):
        permute(5, 5, 0)


def test_keys_of_different_parts_differ() -> None:
    assert key_of(1, "ab", "c") != key_of(1, "a", "bc") != key_of(1, "a", "b", "c")
    assert key_of(7, "stage", "code", 3) == 13417156715611266142  # data order must survive new versions
