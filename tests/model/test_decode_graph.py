"""Decode steps one by one and as a captured graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.schema import RopeConfig
from model.cache import KVCache
from model.decode_graph import Decoder, capturable
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


def gpu_model(key_conv: int = 0) -> CausalLM:
    config = replace(tiny_config("qwen3"), hidden_size=256, num_heads=4, head_dim=64, key_conv=key_conv)
    model = CausalLM(config, RopeConfig())
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to("cuda", torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_gives_the_same_logits() -> None:
    """Fifteen steps that cross the borders of the kernels' tiles and end exactly at the capacity."""
    model = gpu_model()
    assert capturable(model, (FULL,) * 2)
    assert not capturable(model, (FULL, MOBA)) and not capturable(gpu_model(key_conv=3), (FULL,) * 2)
    plain, cache = prefilled(model, 15), prefilled(model, 15)
    decode = Decoder(model, cache, (FULL,) * 2, 15)
    token = torch.tensor([[1], [2]], device="cuda")
    for _ in range(15):
        expected = model.decode(token, plain, (FULL,) * 2)
        logits = decode(token)
        torch.testing.assert_close(logits, expected, atol=1e-2, rtol=1e-2)
        token = expected.argmax(-1)[:, None]
    assert cache.lengths == plain.lengths == cache.lengths_R.tolist()
    with pytest.raises(ValueError, match="max_new_tokens"):
        decode(token)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moba_steps_equal_the_portable_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, token = gpu_model(), torch.tensor([[1], [2]], device="cuda")
    plans = (LayerPlan("moba", 16, 2), LayerPlan("moba", 16, 2, "window"))
    ours, portable = prefilled(model, 20), prefilled(model, 20)
    for _ in range(20):
        logits = model.decode(token, ours, plans)
        with monkeypatch.context() as patch:
            patch.setattr("model.decode.runs_compiled", lambda *_: False)
            expected = model.decode(token, portable, plans)
        torch.testing.assert_close(logits, expected, atol=3e-2, rtol=3e-2)
        token = expected.argmax(-1)[:, None]
