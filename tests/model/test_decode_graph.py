"""Decode steps one by one and as a captured graph."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from conf.schema import RopeConfig
from model.cache import KVCache
from model.decode_graph import MIN_STEPS, Decoder, capturable
from model.generation import decode_on_device
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM
from tests.model.build import VOCAB, tiny_config, tiny_model

LENGTHS = [20, 33]
MOBA = LayerPlan("moba", 16, 2)


def prefilled(model: CausalLM, room: int) -> KVCache:
    weight = next(model.parameters())
    cache = KVCache(model.config, LENGTHS, room, dtype=weight.dtype, device=weight.device)
    ids = torch.randint(0, VOCAB, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    model.prefill(ids.to(weight.device), cache, (FULL,) * model.config.num_layers)
    return cache


def test_on_a_cpu_steps_run_one_by_one() -> None:
    model = tiny_model()
    assert not capturable(model, (FULL,) * 2)
    token = torch.tensor([[1], [2]])
    plain, cache = prefilled(model, 10), prefilled(model, 10)
    decode = Decoder(model, cache, (FULL, MOBA), 10)
    for _ in range(3):
        assert torch.equal(decode(token), model.decode(token, plain, (FULL, MOBA)))
    assert cache.lengths == plain.lengths == cache.lengths_R.tolist() == [n + 3 for n in LENGTHS]


def test_a_cache_in_prefill_is_refused() -> None:
    model = tiny_model()
    cache = KVCache(model.config, [4], 1, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="prefill phase"):
        Decoder(model, cache, (FULL,) * 2, 1)


def test_graphs_hold_between_the_ends_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 20 and 33 tokens fill blocks of 16 in steps 12, 15, 28, 31: captured where eight steps are left."""
    captured: list[int] = []

    class Standing(Decoder):
        def _capture(self, token_R1: torch.Tensor) -> None:
            captured.append(self._cache.lengths[0] - LENGTHS[0])
            self._token_R1, self._graph = token_R1.clone(), object()  # type: ignore[assignment]

        def _replay(self) -> None:
            assert self._cache._means[1] is not None
            before = list(self._cache._means[1].done)
            self._logits_RV = decode_on_device(self._model, self._token_R1, self._cache, self._plans)
            assert self._cache._means[1].done == before, "a replay averages nothing"

    monkeypatch.setattr("model.decode_graph.runs_compiled", lambda *_: True)
    model, plans = tiny_model(), (FULL, MOBA)
    plain, cache = prefilled(model, 40), prefilled(model, 40)
    decode = Standing(model, cache, plans, 40)
    token = torch.tensor([[1], [2]])
    for _ in range(40):
        expected = model.decode(token, plain, plans)
        assert torch.equal(decode(token), expected)
        token = expected.argmax(-1)[:, None]
    assert cache.lengths == plain.lengths == cache.lengths_R.tolist()
    assert captured == [1, 16, 32] and MIN_STEPS == 8


def gpu_model(key_conv: int = 0) -> CausalLM:
    config = replace(tiny_config("qwen3"), hidden_size=256, num_heads=4, head_dim=64, key_conv=key_conv)
    model = CausalLM(config, RopeConfig())
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to("cuda", torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.gpu
@pytest.mark.parametrize("plans", [(FULL, FULL), (MOBA, LayerPlan("moba", 32, 2, "window"))], ids=["full", "moba"])
def test_a_graph_gives_the_same_logits(plans: tuple[LayerPlan, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty steps that cross the borders of tiles and blocks and end exactly at the capacity."""
    captures = []
    capture = Decoder._capture
    monkeypatch.setattr(Decoder, "_capture", lambda *args: captures.append(1) or capture(*args))
    model = gpu_model()
    assert capturable(model, plans) and not capturable(gpu_model(key_conv=3), plans)
    plain, cache = prefilled(model, 40), prefilled(model, 40)
    decode = Decoder(model, cache, plans, 40)
    token = torch.tensor([[1], [2]], device="cuda")
    for _ in range(40):
        expected = model.decode(token, plain, plans)
        torch.testing.assert_close(decode(token), expected, atol=1e-2, rtol=1e-2)
        token = expected.argmax(-1)[:, None]
    assert cache.lengths == plain.lengths == cache.lengths_R.tolist()
    assert len(captures) == (1 if plans[0] == FULL else 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        decode(token)


@pytest.mark.gpu
def test_moba_steps_err_as_the_portable_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same weights in fp32, over twenty steps."""
    model, token = gpu_model(), torch.tensor([[1], [2]], device="cuda")
    plans = (LayerPlan("moba", 16, 2), LayerPlan("moba", 16, 2, "window"))
    wide = copy.deepcopy(model).float()
    ours, portable, exact = prefilled(model, 20), prefilled(model, 20), prefilled(wide, 20)
    errors, size = torch.zeros(2), 0.0
    for _ in range(20):
        logits = model.decode(token, ours, plans)
        with monkeypatch.context() as patch:
            patch.setattr("model.decode.runs_compiled", lambda *_: False)
            rough = model.decode(token, portable, plans)
        expected = wide.decode(token, exact, plans)
        errors += torch.tensor([float((x - expected).norm()) for x in (logits, rough)])
        size += float(expected.norm())
        token = expected.argmax(-1)[:, None]
    assert errors[0] <= 2 * errors[1] and errors[0] < 0.05 * size, (errors, size)
