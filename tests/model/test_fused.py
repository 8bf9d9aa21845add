"""Fused pieces equal the plain ones, and a set that cannot run here is refused."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import RopeConfig
from model import fused
from model.execution import Execution
from model.fused import Pieces, pieces
from model.rope import Rotary
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM
from tests.model.build import packed, tiny_config
from tests.tolerances import assert_close

T, H, HKV, D, WIDE = 96, 4, 2, 64, 144


def outputs_and_gradients(chosen: Pieces, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every piece on the same random inputs."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()

    def weigh(*outs: Tensor) -> Tensor:
        return torch.stack(
            [(out * torch.linspace(0.5, 1.5, out.numel()).view_as(out).to(out)).sum() for out in outs]
        ).sum()

    x, weight = leaf(2, T // 2, WIDE), leaf(WIDE)
    cos, sin = Rotary(RopeConfig(), D).tables(torch.arange(T, device=device) % 40)
    gate, up, grad = leaf(T, WIDE), leaf(T, WIDE), leaf(T, WIDE).detach()
    q, k = leaf(T, H, D), leaf(T, HKV, D)
    found: dict[str, Tensor] = {"norm": chosen.rms_norm(x, weight, 1e-5)}
    found["norm dx"], found["norm dw"] = torch.autograd.grad(weigh(found["norm"]), [x, weight])
    more = leaf(2, T // 2, WIDE)
    outs: tuple[Tensor, ...]
    for name, added in (("add", more), ("lone", None)):
        outs = chosen.add_norm(x * 1, added, weight, 1e-5)
        found[f"{name} sum"], found[f"{name} norm"] = outs
        inputs = [x, weight] if added is None else [x, weight, added]
        grads = torch.autograd.grad(weigh(*outs), inputs)
        found |= {f"{name} {what}": value for what, value in zip(("dx", "dw", "dmore"), grads, strict=False)}
    for index, what in enumerate(("sum", "norm")):  # the other one's gradient is missing
        only = chosen.add_norm(x * 1, more, weight, 1e-5)[index]
        (found[f"add dx by {what}"],) = torch.autograd.grad(weigh(only), [x])
    joint = leaf(2, T // 2, (H + 2 * HKV) * D)
    parts = chosen.split_rope(joint * 1, cos, sin, H, HKV)
    assert all(part.is_contiguous() for part in parts)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 3  # as checkpointing wants them
    found |= dict(zip(("split q", "split k", "split v"), parts, strict=True))
    (found["split d"],) = torch.autograd.grad(weigh(*parts), [joint])
    found["silu"] = chosen.silu_mul(gate * 1, up * 1)
    found["silu dgate"], found["silu dup"] = torch.autograd.grad(weigh(found["silu"]), [gate, up])
    with torch.no_grad():
        tiles = chosen.silu_mul_gradients(gate.detach().clone(), up.detach().clone(), grad)
    found["tile dgate"], found["tile dup"] = tiles
    found["q"], found["k"] = chosen.rope(q * 1, k * 1, cos, sin)
    found["dq"], found["dk"] = torch.autograd.grad(weigh(found["q"], found["k"]), [q, k])
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(name: str, device: str, dtype: torch.dtype) -> None:
    got = outputs_and_gradients(pieces(name, torch.device(device)), device, dtype)
    exact = outputs_and_gradients(fused.PLAIN, "cpu", torch.float32 if dtype == torch.bfloat16 else torch.float64)
    assert got.keys() == exact.keys()
    for piece, want in exact.items():
        assert got[piece].dtype == dtype
        assert_close(got[piece], want, f"{name}: {piece}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_pieces(dtype: torch.dtype) -> None:
    """The gradients written by hand are those of autograd."""
    assert_same("none", "cpu", dtype)
    found = outputs_and_gradients(fused.PLAIN, "cpu", torch.float64)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(3, 5, dtype=torch.float64)
    want = torch.autograd.grad(fused.silu_mul(gate, up), [gate, up], grad)
    for ours, theirs in zip(fused.silu_mul_gradients(gate, up, grad), want, strict=True):
        assert_close(ours, theirs, "silu_mul_gradients", tolerance=1e-6)  # fp32 inside
    assert found["norm"].shape == (2, T // 2, WIDE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.timeout(600)
def test_compiled_on_the_cpu() -> None:
    assert_same("compile", "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "liger", "compile"])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    assert_same(name, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["liger", "compile"])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("tile", [0, 100])
def test_model_on_a_gpu(name: str, mode: str, tile: int) -> None:
    """Loss and gradients of a whole model in fp32, under checkpointing and tiling too."""
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in packed([[70, 186]]).items()}
    results = []
    for execution in (
        Execution(),
        Execution(checkpointing=mode, mlp_tile=tile, pieces=pieces(name, torch.device("cuda"))),
    ):
        model = CausalLM(tiny_config("qwen3", head_dim=64), RopeConfig(), "varlen", execution)
        model.init_weights(torch.Generator().manual_seed(0))
        model.cuda()
        loss = model(**batch, plans=(LayerPlan("moba", 16, 3), FULL)).loss_sum / 100
        loss.backward()
        results.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    want, got = results
    for key, value in want.items():
        assert_close(got[key], value, f"{name} {mode} {tile}: {key}", tolerance=1e-4)


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"engine\.fused=liger runs on CUDA, not on cpu: use engine\.fused=none"):
        pieces("liger", torch.device("cpu"))
    with pytest.raises(UserError, match=r"engine\.fused=xla is not known: use none, liger, compile"):
        pieces("xla", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package liger-kernel"):
        pieces("liger", torch.device("cuda"))
    with pytest.raises(UserError, match=r"needs the package triton"):
        pieces("compile", torch.device("cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        pieces("compile", torch.device("cpu"))
