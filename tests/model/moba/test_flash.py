"""The flash-attention half of `varlen`: its bookkeeping on the CPU with kernels written out here, and on a GPU."""

import itertools

import pytest
import torch
from torch import Tensor

from model import flash as flash_kernels
from model.full import full_attention
from model.moba import flash, moba_attention
from model.moba.reference import reference_attend, reference_attention
from tests.model.moba.cases import NAMES, borders, make_qkv, run
from tests.tolerances import assert_close

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = [1, 15, 16, 17, 60, 64]


class LoopKernels:
    """The contract of FlashKernels, one sequence and one head at a time. What no sequence covers is NaN."""

    calls = 0

    def _each(self, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
        type(self).calls += 1
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
        for (a, b), (c, d) in zip(
            itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
        ):
            assert 0 <= b - a <= max_q and 0 <= d - c <= max_k
            for h in range(q.shape[1] if b > a else 0):
                yield slice(a, b), slice(c, d), h, h // (q.shape[1] // k.shape[1])

    def _score(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        score = q @ k.T * scale
        future = torch.ones_like(score, dtype=torch.bool).triu(1) & causal
        return score.masked_fill(future, -torch.inf)

    def forward(self, q, k, v, cu_q, cu_k, max_q, max_k, *, causal, scale):
        out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], q.shape[0]), torch.nan)
        for i, j, h, g in self._each(q, k, cu_q, cu_k, max_q, max_k):
            score = self._score(q[i, h], k[j, g], causal, scale)
            out[i, h], lse[h, i] = score.softmax(-1) @ v[j, g], score.logsumexp(-1)
        return out, lse

    def backward(self, do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, *, causal, scale):
        dq, dk, dv = torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)
        for i, j, h, g in self._each(q, k, cu_q, cu_k, max_q, max_k):
            p = torch.exp(self._score(q[i, h], k[j, g], causal, scale) - lse[h, i, None])
            ds = p * (do[i, h] @ v[j, g].T - (do[i, h] * out[i, h]).sum(-1, keepdim=True)) * scale
            dq[i, h] = ds @ k[j, g]
            dk[j, g] += ds.T @ q[i, h]
            dv[j, g] += p.T @ do[i, h]
        return dq, dk, dv


@pytest.mark.parametrize("most_sequences", [65_000, 3])
@pytest.mark.parametrize("topk", [1, 3])
def test_lists_and_borders_given_to_the_kernels(
    monkeypatch: pytest.MonkeyPatch, most_sequences: int, topk: int
) -> None:
    monkeypatch.setattr(flash_kernels, "find", lambda q: LoopKernels())
    monkeypatch.setattr(flash, "_MAX_BATCH", most_sequences)
    LoopKernels.calls = 0
    options = {"block_size": 16, "topk": topk, "cu_seqlens": borders(LENGTHS)}
    qkv = make_qkv(sum(LENGTHS), 4, 2)
    actual = run(lambda *x: moba_attention(*x, backend="varlen", **options), qkv)
    assert LoopKernels.calls >= 2 * min(topk, 2)
    exact = run(lambda *x: reference_attention(*x, **options), [x.double() for x in qkv])
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert_close(x, y, name)


def test_full_attention_on_flash_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_kernels, "find", lambda q: LoopKernels())
    LoopKernels.calls = 0
    qkv, cu = make_qkv(sum(LENGTHS), 4, 2), borders(LENGTHS)
    actual = run(lambda *x: full_attention(*x, cu_seqlens=cu, max_seqlen=64), qkv)
    assert LoopKernels.calls == 2
    exact = run(
        lambda *x: reference_attention(*x, block_size=64, topk=1, cu_seqlens=cu), [x.double() for x in qkv]
    )
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert_close(x, y, name)


def test_nothing_is_found_on_a_cpu() -> None:
    assert flash_kernels.find(torch.zeros(4, 2, 64, dtype=torch.bfloat16)) is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dim: int, dtype: torch.dtype) -> None:
    lengths = [1, 127, 128, 129, 700, 1, 963]
    cu = borders(lengths).cuda()
    qkv = [x.to(dtype).cuda() for x in make_qkv(sum(lengths), 8, 2, dim)]
    assert (flash_kernels.find(qkv[0]) is None) == (dtype == torch.float32)
    for topk in (1, 3):
        options = {"block_size": 128, "topk": topk, "cu_seqlens": cu}
        actual = run(lambda *x: moba_attention(*x, backend="varlen", **options), qkv)  # noqa: B023
        exact = run(lambda *x: reference_attention(*x, **options), [x.double() for x in qkv])  # noqa: B023
        for name, x, y in zip(NAMES, actual, exact, strict=True):
            assert_close(x, y, f"{name} topk {topk}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("lengths", [[512], [256, 256], [1, 300, 211]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_attention_on_a_gpu(lengths: list[int], dtype: torch.dtype) -> None:
    cu = borders(lengths).cuda()
    qkv = [x.to(dtype).cuda() for x in make_qkv(512, 8, 2, 64)]
    none = torch.empty(512, 8, 0, dtype=torch.int32, device="cuda")
    actual = run(lambda *x: full_attention(*x, cu_seqlens=cu, max_seqlen=max(lengths)), qkv)
    exact = run(lambda *x: reference_attend(*x, none, block_size=512, cu_seqlens=cu)[0], [x.double() for x in qkv])
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert_close(x, y, name)


@pytest.mark.gpu
@needs_gpu
def test_nothing_waits_for_the_gpu_without_flash_attention() -> None:
    lengths = [100, 412]
    q, k, v = (x.cuda().requires_grad_() for x in make_qkv(512, 4, 2, 32))
    cu = borders(lengths).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moba_attention(q, k, v, block_size=64, topk=3, cu_seqlens=cu, backend="varlen").sum().backward()
        full_attention(q, k, v, cu_seqlens=cu, max_seqlen=412, cu_seqlens_host=[0, 100, 512]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
