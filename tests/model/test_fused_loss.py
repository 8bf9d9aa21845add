"""The fused loss equals cross-entropy on whole logits, values and gradients, with its Triton pass and without."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.constants import IGNORE_INDEX
from conf.errors import UserError
from conf.schema import RopeConfig
from model import fused_loss
from model.execution import Execution
from model.fused_loss import fused_cross_entropy, takes_fused, tile_tokens
from model.loss import LMHead
from model.moba import triton_common
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM
from tests.model.build import packed, tiny_config
from tests.tolerances import assert_close

V, C, T = 300, 24, 26
Grads = tuple[Tensor, Tensor, Tensor]


def inputs(dtype: torch.dtype, device: str = "cpu", vocab: int = V, tokens: int = T) -> Grads:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens // 2, C, generator=draw).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, C, generator=draw).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (2, tokens // 2), generator=draw)
    labels[0, :3] = labels[1, -1] = IGNORE_INDEX
    labels[1, 0], labels[1, 1] = vocab - 1, 0
    return hidden, weight, labels.to(device)


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None) -> Grads:
    """Losses per token and the gradients of 0.37 times their weighted sum, in float64."""
    hidden, weight = (x.detach().double().cpu().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t()).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.cpu().flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    losses = losses.view(labels.shape)
    total = (losses if weights is None else losses * weights.double().cpu()).sum()
    return losses.detach(), *torch.autograd.grad(0.37 * total, (hidden, weight))


def compare(dtype: torch.dtype, device: str, weighted: bool, tile: int, vocab: int = V, tokens: int = T) -> None:
    hidden, weight, labels = inputs(dtype, device, vocab, tokens)
    weights = torch.rand(labels.shape, device=device) * 3 if weighted else None
    total, losses = fused_cross_entropy(hidden, weight, labels, weights, tile)
    assert total.dtype == losses.dtype == torch.float32
    assert not losses.requires_grad
    got = torch.autograd.grad(total * 0.37, (hidden, weight))
    want = oracle(hidden, weight, labels, weights)
    limit = None if dtype == torch.float32 else 3e-2  # of the table, for bf16: losses are fp32 of bf16 logits
    assert_close(losses.cpu(), want[0].float(), "losses", limit)
    assert_close(
        total.detach().cpu(), (want[0] if weights is None else want[0] * weights.cpu()).sum(), "sum", limit
    )
    for name, ours, theirs in zip(("hidden", "weight"), got, want[1:], strict=True):
        assert ours.dtype == dtype
        assert_close(ours.cpu(), theirs, f"gradient of {name}")


@pytest.mark.parametrize("tile", [1, 7, 26, 1000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain_cross_entropy(dtype: torch.dtype, weighted: bool, tile: int) -> None:
    compare(dtype, "cpu", weighted, tile)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")
def test_the_kernel_equals_its_plain_twin(monkeypatch: pytest.MonkeyPatch, weighted: bool, gradient: bool) -> None:
    """Interpreted: several blocks of a row, the last one cut, ignored rows; nothing is left unwritten."""
    from model import triton_loss

    monkeypatch.setattr(triton_loss, "BLOCK", 128)
    draw = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(6, V, generator=draw)
    labels = torch.tensor([0, V - 1, IGNORE_INDEX, 127, 128, 17])
    weights = torch.rand(6, generator=draw) if weighted else None
    got, want = [(logits.clone(), torch.full((6,), float("nan"))) for _ in range(2)]
    triton_loss.softmax_tile(got[0], labels, weights, got[1], gradient=gradient)
    fused_loss._softmax_tile(want[0], labels, weights, want[1], gradient)
    assert torch.equal(got[0], logits) is not gradient
    for ours, theirs, name in zip(got, want, ("logits", "losses"), strict=True):
        assert_close(ours, theirs, name)


@pytest.mark.skipif(not triton_common.INTERPRETED, reason="the kernels of this process are compiled")
def test_scaling_into_another_tensor() -> None:
    from model import triton_loss

    x, out = torch.randn(3, 1001), torch.full((3, 1001), torch.nan)
    triton_loss.scale_into(out, x, torch.tensor([0.37]))
    assert_close(out, x * 0.37, "scaled")


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tile", "vocab"), [(1000, 5000), (7, 5000), (128, 40_001)])
def test_on_a_gpu(dtype: torch.dtype, weighted: bool, tile: int, vocab: int) -> None:
    compare(dtype, "cuda", weighted, tile, vocab, 300)


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """Vocabulary of 128K: at the peak one tile, the gradients and no whole logits (8 GiB)."""
    tokens, vocab, width = 32_768, 128_256, 256
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_cross_entropy(hidden, weight, labels)[0].backward()
    gradients = vocab * width * 6 + tokens * width * 2
    assert torch.cuda.max_memory_allocated() - before < fused_loss.TILE_BYTES + gradients + 2**26


def test_gradients_are_given_once_and_only_where_wanted() -> None:
    hidden, weight, labels = inputs(torch.float32)
    total, _ = fused_cross_entropy(hidden, weight, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"gives its gradients once: use engine\.loss=tiled"):
        total.backward()
    frozen, _ = fused_cross_entropy(hidden, weight.detach(), labels)
    (alone,) = torch.autograd.grad(frozen, hidden)
    assert_close(alone, oracle(hidden, weight, labels, None)[1] / 0.37, "gradient of hidden alone")
    with torch.no_grad():
        total, losses = fused_cross_entropy(hidden, weight, labels)
    assert not total.requires_grad
    assert_close(losses, oracle(hidden, weight, labels, None)[0].float(), "losses without a gradient")


def test_huge_logits_stay_finite() -> None:
    hidden, weight, labels = inputs(torch.float32)
    total, losses = fused_cross_entropy(hidden * 1e4, weight, labels)
    total.backward()
    assert bool(torch.isfinite(losses).all())
    assert hidden.grad is not None and bool(torch.isfinite(hidden.grad).all())


def test_no_tile_is_larger_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_tokens(128_256, 2, 2**20) * 128_256 * 2 <= fused_loss.TILE_BYTES
    assert tile_tokens(128_256, 2, 8192) == 8192
    assert tile_tokens(128_256, 2, 2 * 5000) == 5120  # two equal parts, in groups of 128
    assert tile_tokens(1000, 4, 50) == 50
    largest = 0
    product = torch.mm

    def watch(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        nonlocal largest
        if y.shape[1] == V:
            largest = max(largest, x.shape[0])
        return product(x, y, out=out)

    monkeypatch.setattr("model.fused_loss.torch.mm", watch)
    monkeypatch.setattr(fused_loss, "TILE_BYTES", 4 * V * 4)
    hidden, weight, labels = inputs(torch.float32)
    fused_cross_entropy(hidden, weight, labels)[0].backward()
    assert largest == 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_has_the_same_gradients(tied: bool) -> None:
    """Through the head and the trunk, with a tied head and checkpointing; single losses stay differentiable."""
    batch, plans = packed([[40, 24], [64]]), (LayerPlan("moba", 16, 2), FULL)
    results = []
    for execution in (Execution(), Execution(fused_loss=True, checkpointing="full")):
        model = CausalLM(tiny_config(tie_embeddings=tied), RopeConfig(), "varlen", execution)
        model.init_weights(torch.Generator().manual_seed(0))
        weights = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
        sums = model(**batch, plans=plans, trailing=8, weights=weights)
        (sums.loss_sum / 7).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        found |= {name: value.detach() for name, value in sums._asdict().items()}
        model.zero_grad()
        model.token_losses(**batch, plans=plans).square().sum().backward()
        found |= {f"single: {name}": p.grad for name, p in model.named_parameters()}
        with torch.no_grad():
            found["losses"] = model.token_losses(**batch, plans=plans)
        results.append(found)
    want, got = results
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.is_floating_point():
            assert_close(got[name], value, name)
        else:
            assert torch.equal(got[name], value), name


def test_which_loss_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [takes_fused(name, cpu) for name in fused_loss.LOSSES] == [False, True, False]
    assert [takes_fused(name, gpu) for name in fused_loss.LOSSES] == [True, True, False]
    assert LMHead(C, V).fused is False
    with pytest.raises(UserError, match=r"engine\.loss=quick is not known: use auto, fused, tiled"):
        takes_fused("quick", cpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the fused loss needs the package triton on a GPU"):
        takes_fused("auto", gpu)
