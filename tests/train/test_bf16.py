"""Fewer passes over the gradients, the same numbers: against DeepSpeed's optimizer as it comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gloo import GlooPool
from tests.train import bf16_jobs as jobs
from tests.train.jobs import tiny_config
from train.bf16 import _shrink
from train.optim import GuardedAdamW


@pytest.mark.parametrize("tied", [False, True])
def test_equals_deepspeeds_own(pool2: GlooPool, tied: bool) -> None:
    """Accumulation and clipping included; only the order in which the norm is summed may differ."""
    (want, _), (got, _) = pool2(jobs.train, False, tied), pool2(jobs.train, True, tied)
    assert min(want["grad_norm"]) > tiny_config().optim.clip
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=1e-6)
    for name, tensor in want["tensors"].items():
        np.testing.assert_allclose(got["tensors"][name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)


def test_adamw_in_one_pass(pool2: GlooPool) -> None:
    """Each rank its share, then the rounded weights to all."""
    pytest.importorskip("triton")
    (want, plain), (got, first) = pool2(jobs.one_pass, False)[0], pool2(jobs.one_pass, True)[0]
    (_, second) = pool2(jobs.one_pass, True)[1]
    for name, tensor in want["tensors"].items():
        np.testing.assert_allclose(got["tensors"][name], tensor, rtol=1e-5, atol=1e-7, err_msg=name)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain, rtol=2**-7, atol=0)  # the interpreter cuts digits off


def test_an_engine_that_ended_is_gone(pool1: GlooPool) -> None:
    """A run that rolls back builds another one in the same process."""
    [gone] = pool1(jobs.freed)
    assert len(gone) > 1 and all(gone)


def test_joint_projections(pool2: GlooPool) -> None:
    """q, k and v as one product out of the optimizer's flat weights, its gradient into their flat sums."""
    (want, none), (got, joined) = pool2(jobs.joined, False)[0], pool2(jobs.joined, True)[0]
    assert not none and len(joined) == tiny_config().model.num_layers and all(joined)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-3)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=1e-2)
    for name, tensor in want["tensors"].items():
        error = np.linalg.norm(got["tensors"][name] - tensor) / np.linalg.norm(tensor)
        limit = 1e-1 if name.startswith(":") else 3e-2  # AdamW turns rounding into sign in small gradients
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_moments_are_not_made_twice(pool1: GlooPool, zero_stage: int) -> None:
    [stay] = pool1(jobs.moments_stay, zero_stage)
    assert stay and all(stay)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_missing_is_zero(pool2: GlooPool, accumulation: int) -> None:
    """Not what the buffer held before."""
    (want, _), (got, _) = (pool2(jobs.absent, lean, accumulation) for lean in (False, True))
    for ours, theirs in zip(got, want, strict=True):
        for name, moment in theirs.items():
            torch.testing.assert_close(ours[name], moment, rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.equal(want[0]["second.weight"], want[1]["second.weight"])


def test_a_lone_rank_reduces_nothing_and_rounds_nothing(pool1: GlooPool) -> None:
    moment, reduces = pool1(jobs.exact_sum)[0]
    assert not reduces
    want = torch.full_like(moment, (1 + 2.0**-9) * (1 - tiny_config().optim.beta1))
    torch.testing.assert_close(moment, want, rtol=1e-6, atol=0)  # in bf16 the sum would be 1


def test_a_gradient_that_is_not_finite_changes_nothing(pool1: GlooPool) -> None:
    """Also where no guard watches."""
    before, after, norm = pool1(jobs.not_finite)[0]
    assert torch.equal(before, after)
    assert not np.isfinite(norm)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("norm", [0.5, 1.0, 8.0])
def test_adamw_scales_as_clipping_does(norm: float, device: str) -> None:
    updates = []
    for shrink in (False, True):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 64, device=device))
        adamw = GuardedAdamW([param], lr=0.1, eps=0.1, fused=device == "cuda")
        for step in range(2):
            param.grad = torch.full_like(param, 0.3 * (step + 1))
            if shrink:
                adamw.shrink = lambda: _shrink(torch.tensor(norm, device=device), 1.0)
            elif norm > 1:
                param.grad /= norm
            adamw.step()
        updates.append(param.detach().clone())
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-5, atol=1e-6)
    assert float((updates[0] - torch.linspace(-1, 1, 64, device=device)).abs().max()) > 1e-2
