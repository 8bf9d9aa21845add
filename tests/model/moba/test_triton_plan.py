"""Memory plans: they cover everything once and stay within their budget where that is possible."""

import pytest

pytest.importorskip("triton")
from model.moba.triton_plan import MIN_BUDGET, Plan, default_budget, make_plan

GIB = 1 << 30


@pytest.mark.parametrize("tokens", [8192, 131072, 1 << 20, 1 << 21])
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (8, 2), (8, 8)])
@pytest.mark.parametrize("slots", [0, 2, 7, 11])
def test_partials_fit(tokens, heads, kv_heads, slots):
    budget = default_budget(tokens, heads, kv_heads, 128, 2)
    plan = make_plan(tokens, heads, kv_heads, 128, slots, 2, budget)
    assert [t for r in plan.token_ranges(tokens) for t in (r.start, r.stop)][1:-1:2] == [
        r.start for r in plan.token_ranges(tokens)[1:]
    ]
    assert sum(map(len, plan.token_ranges(tokens))) == tokens
    assert sorted(h for r in plan.head_ranges(kv_heads) for h in r) == list(range(kv_heads))
    partials = plan.heads * plan.tokens * (heads // kv_heads) * slots * (128 * 2 + 4)
    assert partials <= budget or plan.tokens == 128
    assert plan.tokens == tokens or plan.heads == 1


def test_default_budget_is_a_quarter_of_dense_or_four_gib():
    assert default_budget(8192, 32, 8, 128, 2) == MIN_BUDGET == 4 * GIB
    assert default_budget(1 << 21, 32, 8, 128, 2) == (1 << 21) * 40 * 128 * 2


def test_no_budget_is_the_finest_cut():
    assert make_plan(1000, 8, 2, 64, 3, 2, 1) == Plan(heads=1, tokens=128, keep_lists=False)


def test_lists_that_fill_the_budget_do_not_cut_the_work_into_crumbs():
    """10M tokens with 60 blocks each: by what the budget leaves, 81,920 pieces of 128 tokens."""
    tokens, slots = 10 << 20, 59
    plan = make_plan(tokens, 1, 1, 128, slots, 2, default_budget(tokens, 1, 1, 128, 2))
    assert len(plan.token_ranges(tokens)) < 200
    partials, lists = plan.tokens * slots * (128 * 2 + 4), tokens * slots * 16 + 4 * tokens * 128
    assert partials < lists / 15
