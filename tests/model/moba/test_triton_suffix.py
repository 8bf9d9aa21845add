"""The Triton kernels for the last queries of a row: the values of attention over the whole row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.moba.choosers import choose
from model.moba.reference import reference_attend
from model.schedule import LayerPlan
from tests.model.moba.cases import borders, make_qkv
from tests.tolerances import assert_close

triton = pytest.importorskip("triton")
from model.moba import triton_common  # noqa: E402
from model.moba.triton_suffix import attend_row  # noqa: E402

# keys, queries, block_size, topk, chooser
CASES = {
    "from a block's start": (96, 48, 16, 3, "moba"),
    "from inside a block": (90, 37, 16, 3, "moba"),
    "all of it": (90, 90, 16, 3, "moba"),
    "one query": (90, 1, 16, 3, "moba"),
    "inside the last block": (90, 5, 16, 3, "moba"),
    "first block only": (9, 4, 16, 3, "moba"),
    "own block only": (90, 37, 16, 1, "moba"),
    "every block": (90, 37, 16, 99, "moba"),
    "block of two tiles": (150, 70, 64, 2, "moba"),
    "window": (90, 37, 16, 3, "window"),
    "sink and window": (90, 37, 16, 3, "sink_window"),
}


def _whole(q: Tensor, k: Tensor, v: Tensor, plan: LayerPlan) -> Tensor:
    cu = borders([q.shape[0]]).to(q.device)
    ids = choose(plan.choose, q, k, block_size=plan.block_size, topk=plan.topk, cu_seqlens=cu, backend="reference")
    return reference_attend(q, k, v, ids, block_size=plan.block_size, cu_seqlens=cu)[0]


@pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("budget", [None, 1], ids=["at once", "cut"])
@pytest.mark.parametrize("name", CASES)
def test_values_of_the_whole_row(name: str, budget: int | None) -> None:
    keys, queries, size, topk, chooser = CASES[name]
    plan = LayerPlan("moba", size, topk, chooser)
    q, k, v = make_qkv(keys, 4, 2)
    expected = _whole(q, k, v, plan)[-queries:]
    assert_close(attend_row(q[-queries:], k, v, plan, 0.25, budget=budget), expected, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("keys", "queries", "size", "topk"), [(4096, 2048, 512, 3), (5000, 1900, 128, 8)])
def test_gpu(keys: int, queries: int, size: int, topk: int, dim: int) -> None:
    plan = LayerPlan("moba", size, topk)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in make_qkv(keys, 8, 2, dim))
    expected = _whole(q.float(), k.float(), v.float(), plan)[-queries:]
    assert_close(attend_row(q[-queries:], k, v, plan, dim**-0.5), expected, "out")
