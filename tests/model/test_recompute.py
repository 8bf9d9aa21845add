"""Activation checkpointing, offload and the tiled MLP: equal gradients, equal blocks, and really less kept."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import RopeConfig
from model import offload, recompute
from model.execution import Execution
from model.hold import hold
from model.recompute import pack_ids, unpack_ids
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM
from tests.model.build import packed, tiny_config
from tests.tolerances import assert_close
from train.live_memory import LiveMemory

BATCH = packed([[70, 26], [96]])
MOBA = LayerPlan("moba", 16, 3)
PLANS = {
    "full": (FULL, FULL, FULL),
    "moba": (MOBA, MOBA, MOBA),
    "hybrid": (MOBA, FULL, LayerPlan("moba", 16, 2, "window")),
}
SWITCHES = [
    Execution(checkpointing=mode, offload_checkpoints=moved, mlp_tile=tile)
    for mode, moved, tile in itertools.product(("none", "full", "selective"), (False, True), (0, 40))
    if not (mode == "none" and moved)
]


def build(execution: Execution, backend: str = "varlen", **changes: Any) -> CausalLM:
    model = CausalLM(tiny_config("qwen3", num_layers=3, **changes), RopeConfig(), backend, execution)
    model.init_weights(torch.Generator().manual_seed(0))
    if model.model.offload is not None:
        model.model.offload = offload.HostOffload(min_bytes=0)
    return model


def gradients(model: CausalLM, plan: str) -> dict[str, Tensor]:
    loss = model(**BATCH, plans=PLANS[plan]).loss_sum / 100
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **{name: grad for name, grad in named.items() if grad is not None}}


@pytest.mark.parametrize(
    "execution", SWITCHES, ids=lambda e: f"{e.checkpointing}-{e.offload_checkpoints}-{e.mlp_tile}"
)
@pytest.mark.parametrize("plan", PLANS)
def test_equal_gradients(execution: Execution, plan: str) -> None:
    want = gradients(build(Execution()), plan)
    got = gradients(build(execution), plan)
    assert got.keys() == want.keys() and len(want) == 37
    for name, grad in want.items():
        if execution.mlp_tile:
            assert_close(got[name], grad, name)
        else:
            assert torch.equal(got[name], grad), name


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("backend", ["varlen", "reference"])
def test_blocks_are_chosen_once(mode: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that would choose otherwise in the recomputation is never asked: gradients stay those of its first
    answer. In selective mode attention as a whole runs once."""
    from model.moba import api

    calls = {"choose": 0, "attend": 0}
    used: list[Tensor] = []
    genuine = api._backend

    def watched(name: str, q: Tensor, block_size: int) -> Any:
        found = genuine(name, q, block_size)

        class Watched:
            full_when_dense = found.full_when_dense

            @staticmethod
            def choose(*args: Any) -> Tensor:
                calls["choose"] += 1
                ids: Tensor = found.choose(*args)
                return ids if calls["choose"] <= 3 else torch.full_like(ids, -1)

            @staticmethod
            def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *args: Any) -> Tensor:
                calls["attend"] += 1
                used.append(ids.clone())
                out: Tensor = found.attend(q, k, v, ids, *args)
                return out

        return Watched

    want = gradients(build(Execution(), backend), "moba")
    monkeypatch.setattr(api, "_backend", watched)
    got = gradients(build(Execution(checkpointing=mode), backend), "moba")
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name
    assert calls == {"choose": 3, "attend": 6 if mode == "full" else 3}
    if mode == "full":  # recomputed from the last layer to the first
        for first, again in zip(used[:3], reversed(used[3:]), strict=True):
            assert torch.equal(first, again)


def kept_bytes(execution: Execution, plan: str) -> int:
    """Bytes of the activations that the graph of a forward pass keeps."""
    model = build(execution)
    outside = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**BATCH, plans=PLANS[plan])
    return sum(size for place, size in kept.items() if place not in outside)


def test_less_is_kept() -> None:
    """Full: a block's input; selective: also what attention saved but q, k and v; tiled: nothing of the MLP."""
    tokens, hidden, inner = 192, 32, 48
    plain = kept_bytes(Execution(), "moba")
    full = kept_bytes(Execution(checkpointing="full"), "moba")
    assert plain - full > 3 * tokens * (2 * hidden + 3 * inner) * 4
    assert kept_bytes(Execution(mlp_tile=40), "moba") <= plain - 3 * tokens * 3 * inner * 4


def test_selective_keeps_output_and_ids_but_not_q_k_v() -> None:
    """Of all that attention saves, [T, H, D] stays once (the output) and no [T, Hkv, D]; ids in a byte."""
    kept: list[Tensor] = []
    genuine = recompute._Keep.pack

    def pack(self: Any, x: Tensor) -> Any:
        packed_x = genuine(self, x)
        if len(packed_x) == 2:
            kept.append(packed_x[1])
        return packed_x

    recompute._Keep.pack = pack  # type: ignore[method-assign]
    try:
        build(Execution(checkpointing="selective"))(**BATCH, plans=PLANS["moba"])
    finally:
        recompute._Keep.pack = genuine  # type: ignore[method-assign]
    shapes = [(tuple(x.shape), x.dtype) for x in kept]
    assert shapes.count(((192, 4, 16), torch.float32)) == 3
    assert shapes.count(((192, 4, 2), torch.uint8)) == 3
    assert not any(shape == (192, 2, 16) for shape, _ in shapes)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("moved", [False, True])
def test_nothing_recomputed_stays(mode: str, moved: bool) -> None:
    """After backward, with the loss and so the graph still there, only gradients are left."""
    model = build(Execution(checkpointing=mode, offload_checkpoints=moved, mlp_tile=40))
    with LiveMemory() as memory:
        memory.watch([*model.parameters(), *(x for x in BATCH.values() if isinstance(x, Tensor))])
        before = memory.live
        loss = model(**BATCH, plans=PLANS["moba"]).loss_sum
        loss.backward()
        gc.collect()
        left = memory.live - before - sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
        if model.model.offload is not None:
            left -= sum(x.numel() for free in model.model.offload._buffers._free.values() for x in free)
    assert loss.requires_grad and left < 192 * 32 * 4  # less than one hidden state


def test_recomputation_stops_before_the_tiled_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is not needed again: three products of the forward pass, and five of backward, per tile."""
    from model import tiled_mlp

    passes = 0
    genuine = tiled_mlp._TiledMLP.forward

    def counted(*args: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return genuine(*args)

    monkeypatch.setattr(tiled_mlp._TiledMLP, "forward", staticmethod(counted))
    for mode in ("full", "selective"):
        passes = 0
        gradients(build(Execution(checkpointing=mode, mlp_tile=40)), "moba")
        assert passes == 3


def test_evaluation_and_probes_pass_through() -> None:
    model = build(Execution(checkpointing="selective", offload_checkpoints=True, mlp_tile=7))
    plain = build(Execution())
    hidden = {key: value for key, value in BATCH.items() if key != "labels"}
    seen: list[int] = []
    with torch.no_grad():
        want = plain.token_losses(**BATCH, plans=PLANS["moba"])
        assert_close(model.token_losses(**BATCH, plans=PLANS["moba"]), want, "losses")
        model.hidden(**hidden, plans=PLANS["moba"], probe=lambda layer, q, k, ids: seen.append(layer))
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="no_grad"):
        model.hidden(**hidden, plans=PLANS["moba"], probe=lambda layer, q, k, ids: None)


def test_ids_survive_packing() -> None:
    for num_blocks, dtype in (
        (255, torch.uint8),
        (256, torch.int16),
        (2**15, torch.int16),
        (2**15 + 1, torch.int32),
    ):
        ids = torch.tensor([-1, 0, 1, num_blocks - 1], dtype=torch.int32)
        narrow = pack_ids(ids, num_blocks)
        assert narrow.dtype == dtype
        assert torch.equal(unpack_ids(narrow), ids)


def test_hold_gives_back_what_it_was_given() -> None:
    x = torch.randn(3, requires_grad=True)
    (y,), held = hold(x * 2)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    (z,), held = hold(torch.ones(2))  # without gradients of its own
    assert torch.equal(held.take()[0], torch.ones(2)) and torch.equal(z, torch.ones(2))
