"""Host memory for what checkpointing keeps: values, buffers used again, and copies beside computation on a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conf.schema import RopeConfig
from model.execution import Execution
from model.offload import HostOffload, _is_dense, _Slot
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM
from tests.model.build import packed, tiny_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def chain(offload: HostOffload, weights: list[Tensor], x: Tensor) -> Tensor:
    """Checkpointed layers as the model runs them."""
    offload.begin()
    for weight in weights:
        with offload.layer():
            x = checkpoint(lambda x, w=weight: torch.tanh(x @ w), x, use_reentrant=False)
    return x


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_and_buffers(device: str) -> None:
    """Three steps: the gradients of no offloading, from no more buffers than layers."""
    offload = HostOffload(min_bytes=0)
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, 16, generator=draw).to(device).requires_grad_() for _ in range(4)]
    x = torch.randn(5, 16, generator=draw).to(device).requires_grad_()
    plain = x
    for weight in weights:
        plain = torch.tanh(plain @ weight)
    want = torch.autograd.grad(plain.square().sum(), [x, *weights])
    for _ in range(3):
        got = torch.autograd.grad(chain(offload, weights, x).square().sum(), [x, *weights])
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)
        gc.collect()
        assert [len(free) for free in offload._buffers._free.values()] == [4]


def test_a_graph_may_be_used_twice_or_never() -> None:
    offload = HostOffload(min_bytes=0)
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(2)]
    x = torch.randn(3, 8, requires_grad=True)
    chain(offload, weights, x)  # no backward
    first, second = chain(offload, weights, x), chain(offload, weights, 2 * x)  # two graphs alive at once
    grads = torch.autograd.grad(first.sum(), weights, retain_graph=True)
    again = torch.autograd.grad(first.sum(), weights)
    other = torch.autograd.grad(second.sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert not torch.equal(grads[0], other[0])


def test_what_moves() -> None:
    """Large dense tensors, once each; not parameters, small tensors or views with gaps. Layouts survive."""
    offload = HostOffload(min_bytes=64)
    dense = torch.randn(4, 6, 8).transpose(0, 2)
    with offload.layer():
        slot, twice = offload.pack(dense), offload.pack(dense)
        assert isinstance(slot, _Slot) and slot is twice
        for kept in (torch.ones(15), torch.randn(20, 4)[:, :2], torch.nn.Parameter(torch.ones(64)), torch.ones(0)):
            assert offload.pack(kept) is kept
    back = offload.unpack(slot)
    assert torch.equal(back, dense) and back.stride() == dense.stride()
    assert back.data_ptr() != dense.data_ptr()
    assert slot.back is not None  # one of two still to come
    offload.unpack(slot)
    assert slot.back is None


def test_dense() -> None:
    x = torch.empty(2, 3, 4)
    assert all(_is_dense(view) for view in (x, x.permute(2, 0, 1), x[1], torch.empty(3, 1, 2).transpose(0, 1)))
    assert not any(
        _is_dense(view) for view in (x[:, :2], x.expand(2, 3, 4)[..., ::2], torch.ones(1, 2).expand(3, 2))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_model_on_a_gpu(mode: str) -> None:
    """bf16, kernels included: gradients as equal as those of two runs without (cuDNN varies);
    less memory between forward and backward."""
    config = tiny_config(num_layers=6, hidden_size=512, num_heads=8, num_kv_heads=4, head_dim=64)
    batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in packed([[8192]]).items()}
    plans = (LayerPlan("moba", 512, 3), FULL) * 3
    results = []
    for moved in (False, False, True):
        model = CausalLM(config, RopeConfig(), "auto", Execution(checkpointing=mode, offload_checkpoints=moved))
        model.init_weights(torch.Generator().manual_seed(0))
        model.cuda().bfloat16()
        for _ in range(2):  # the second step finds its buffers
            model.zero_grad()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            loss = model(**batch, plans=plans).loss_sum
            torch.cuda.synchronize()
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
        results.append((kept, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (plain_bytes, plain), (_, again), (moved_bytes, moved_grads) = results
    for name, grad in plain.items():
        noise, error = ((x[name].double() - grad.double()).norm() for x in (again, moved_grads))
        assert noise < 0.1 * grad.double().norm(), name
        assert error <= 2 * noise, name
    one_layer = 8192 * 512 * 2
    assert moved_bytes < plain_bytes - 4 * one_layer
