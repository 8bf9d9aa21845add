"""The paths of cached attention: each against attention over whole rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from model import decode
from model.cache import KVCache
from model.decode import decode_attention, part_attention
from model.moba import triton_common
from model.moba.choosers import choose
from model.moba.reference import reference_attend
from model.moba.suffix import row_kernel, suffix_attention
from model.schedule import FULL, LayerPlan
from tests.model.build import tiny_config
from tests.model.moba.cases import borders, make_qkv
from tests.tolerances import assert_close

LENGTHS = [37, 16, 90]
PLANS = {
    "full": FULL,
    "moba": LayerPlan("moba", 16, 2),
    "window": LayerPlan("moba", 16, 3, "window"),
    "all blocks": LayerPlan("moba", 16, 99),
}


def rows() -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of each row, one token longer than LENGTHS says: the one that is decoded."""
    return [make_qkv(n + 1, 4, 2, seed=n) for n in LENGTHS]


def whole(q: Tensor, k: Tensor, v: Tensor, plan: LayerPlan) -> Tensor:
    cu, n = borders([q.shape[0]]), q.shape[0]
    if plan.kind == "full":
        size, ids = n, torch.empty(n, 4, 0, dtype=torch.int32)
    else:
        size = plan.block_size
        ids = choose(plan.choose, q, k, block_size=size, topk=plan.topk, cu_seqlens=cu, backend="reference")
    return reference_attend(q, k, v, ids, block_size=size, cu_seqlens=cu)[0]


def filled(part: list[tuple[int, int, int]] | None = None) -> KVCache:
    """A cache that holds LENGTHS; in its prefill phase with a part to run, else about to decode."""
    cache = KVCache(tiny_config("llama"), LENGTHS, 3, dtype=torch.float32, device="cpu")
    for row, (_, k, v) in enumerate(rows()):
        cache.keys[0][row, : LENGTHS[row]], cache.values[0][row, : LENGTHS[row]] = k[:-1], v[:-1]
    if part is not None:
        cache.part = part
        return cache
    cache.end_prefill()
    cache.append(0, *(torch.stack([row[i][-1] for row in rows()]) for i in (1, 2)))
    return cache


@pytest.mark.parametrize("kernels", [False, True], ids=["portable", "kernels"])
@pytest.mark.parametrize("name", PLANS)
def test_a_decoded_token(name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run in Triton's interpreter, where everything else is as on a GPU."""
    if kernels and not triton_common.INTERPRETED:
        pytest.skip("the kernels of this process are compiled")
    monkeypatch.setattr(decode, "runs_compiled", lambda *_: kernels)
    q = torch.stack([row[0][-1] for row in rows()])
    expected = torch.stack([whole(*row, PLANS[name])[-1] for row in rows()])
    assert_close(decode_attention(q, filled(), 0, PLANS[name]), expected, name)


PARTS = [
    [(0, 0, 37), (1, 0, 16), (2, 0, 90)],
    [(0, 20, 37), (2, 33, 64)],
    [(2, 89, 90)],
]


@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.parametrize("part", PARTS, ids=["all", "two rows", "a token"])
@pytest.mark.parametrize("name", PLANS)
def test_a_part_of_the_prompts(
    name: str, part: list[tuple[int, int, int]], row_by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the GPU's kernels take them, row by row and in place, and all together; tokens too many get zeros."""
    plan = PLANS[name]

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return suffix_attention(
            q, k, v, query_lengths=[q.shape[0]], key_lengths=[k.shape[0]], layer_plan=plan
        )  # fmt: skip

    if row_by_row:
        monkeypatch.setattr(decode, "row_kernel", lambda *_: kernel)
    wholes = {row: whole(q[:-1], k[:-1], v[:-1], plan) for row, (q, k, v) in enumerate(rows())}
    expected = torch.cat([wholes[row][a:b] for row, a, b in part])
    q = torch.cat([rows()[row][0][a:b] for row, a, b in part])
    assert_close(part_attention(q, filled(part), 0, plan), expected, name)
    padded = torch.cat([q, torch.full((3, 4, 16), float("nan"))])
    out = part_attention(padded, filled(part), 0, plan)
    assert_close(out[:-3], expected, name)
    assert torch.equal(out[-3:], torch.zeros(3, 4, 16))


@pytest.mark.parametrize("backend", ["auto", "varlen", "reference"])
@pytest.mark.parametrize("name", PLANS)
def test_a_cpu_has_no_kernels_for_rows(name: str, backend: str) -> None:
    assert row_kernel(torch.empty(5000, 4, 16), 5000, PLANS[name], backend) is None


def test_a_named_backend_that_cannot_do_it_is_an_error() -> None:
    with pytest.raises(UserError, match="backend=triton"):
        row_kernel(torch.empty(5000, 4, 16), 5000, PLANS["moba"], "triton")
