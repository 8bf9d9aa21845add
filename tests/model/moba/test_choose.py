import pytest
import torch
from torch import Tensor

from model.moba import choose, choose_blocks
from model.moba.blocks import build_block_table
from model.moba.reference import reference_choose
from tests.model.moba.cases import borders, make_qkv

LENGTHS = [1, 15, 16, 17, 150, 64, 33]


def as_sets(ids: Tensor) -> list[list[int]]:
    """Each query's blocks in one order; -1 removed."""
    return [sorted(i for i in row if i >= 0) for row in ids.flatten(0, 1).tolist()]


@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("topk", [1, 2, 4, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_equals_the_oracle_ties_included(size: int, topk: int, heads: int, kv_heads: int) -> None:
    q, k, _ = make_qkv(sum(LENGTHS), heads, kv_heads, 4)  # few values in few dimensions: many ties
    options = {"block_size": size, "topk": topk, "cu_seqlens": borders(LENGTHS)}
    ids = choose_blocks(q, k, **options)
    expected = reference_choose(q.double(), k.double(), **options)
    assert ids.dtype == torch.int32 and ids.shape[:2] == q.shape[:2]
    assert ids.shape[2] == min(topk - 1, (sum(LENGTHS) - 1) // size)
    assert as_sets(ids) == as_sets(expected)


@pytest.mark.parametrize("topk", [3, 16])  # rounds of maxima, one sort
def test_equal_scores_take_the_lowest_blocks(topk: int) -> None:
    q, k = torch.ones(16 * 24, 2, 4), torch.ones(16 * 24, 1, 4)
    ids = choose_blocks(q, k, block_size=16, topk=topk)
    own = torch.arange(16 * 24) // 16
    expected = [sorted(range(min(int(b), topk - 1))) for b in own for _ in range(2)]
    assert as_sets(ids) == expected


@pytest.mark.parametrize("topk", [3, 15])
def test_any_workspace_gives_the_same(topk: int) -> None:
    q, k, _ = make_qkv(400, 4, 2, seed=3)
    table = build_block_table(borders([250, 150]), 400, 16)
    whole = choose.choose(q, k, table, topk - 1)
    for workspace in (1, 3000, 100_000):
        assert torch.equal(choose.choose(q, k, table, topk - 1, workspace=workspace), whole)


def test_scores_stay_within_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = make_qkv(600, 4, 2)
    table = build_block_table(borders([600]), 600, 16)
    sizes: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(bmm(a, b).nbytes) or bmm(a, b))
    choose.choose(q, k, table, 2, workspace=20_000)
    assert len(sizes) > 3 and max(sizes) <= 20_000


def test_means_are_summed_in_fp32() -> None:
    # 256 + 1 is lost in bf16, so a bf16 sum of these keys would be 256 / 16 in every block.
    k = torch.ones(48, 1, 1, dtype=torch.bfloat16)
    k[::16] = 256
    mean = choose.block_means(k, build_block_table(borders([48]), 48, 16))
    assert mean.dtype == torch.float32 and mean.flatten().tolist() == [(256 + 15) / 16] * 3


def test_a_score_of_nan_is_never_chosen() -> None:
    q, k, _ = make_qkv(64, 1, 1)
    k[20] = torch.nan
    ids = choose_blocks(q, k, block_size=16, topk=4)
    assert 1 not in ids and ids.max() == 2


def test_no_gradient_through_the_choice() -> None:
    q, k, _ = (x.requires_grad_() for x in make_qkv(64, 2, 1))
    assert not choose_blocks(q, k, block_size=16, topk=3).requires_grad
