"""Prompts that begin alike: equal answers with and without sharing, and fewer tokens run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conf.schema import ModelConfig, RopeConfig
from eval.generate import generate
from eval.prefixes import MIN_SHARED, Prefixes
from model.cache import KVCache, Part
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM

PLANS = {"full": (FULL,) * 2, "moba": (LayerPlan("moba", 16, 2), LayerPlan("moba", 16, 3))}


def model_of(key_conv: int = 0) -> CausalLM:
    config = ModelConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
        init_std=0.4, key_conv=key_conv,
    )  # fmt: skip
    model = CausalLM(config, RopeConfig())
    model.init_weights(torch.Generator().manual_seed(3))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return model_of()


def grid() -> list[list[list[int]]]:
    """Batches as a needle grid makes them: one haystack, parted where the needle is, the deepest first."""
    g = torch.Generator().manual_seed(0)
    haystack = torch.randint(0, 61, (300,), generator=g).tolist()
    batches = []
    for depth in (290, 211, 96, 40, 3):
        needles = torch.randint(0, 61, (3, 9), generator=g).tolist()
        batches.append(
            [haystack[:depth] + needle + haystack[depth:] + [5, 6, row] for row, needle in enumerate(needles)]
        )
    batches[1][2] = batches[1][2][:250]  # not all of one length
    return [*batches, [haystack[:200]], [haystack[:200]], [haystack[:1]]]


@pytest.fixture
def run_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompt tokens that are run, part by part."""
    seen: list[int] = []
    genuine = KVCache.parts

    def parts(self: KVCache, chunk: int) -> Iterator[Part]:
        for part in genuine(self, chunk):
            seen.append(sum(end - first for _, first, end in part))
            yield part

    monkeypatch.setattr(KVCache, "parts", parts)
    return seen


@pytest.mark.parametrize("chunk", [0, 50, 10_000])
@pytest.mark.parametrize("name", PLANS)
def test_equal_answers_and_fewer_tokens(model: CausalLM, name: str, chunk: int, run_tokens: list[int]) -> None:
    kinds: dict[str, Any] = {"max_new_tokens": 8, "eos_id": None, "chunk": chunk}
    kinds |= {"prefill_plans": PLANS[name], "decode_plans": PLANS["full"]}
    prefixes = Prefixes()
    answers, tokens = [], []
    for shared in (False, True):
        run_tokens.clear()
        answers.append(
            [
                generate(
                    model,
                    batch,
                    prefixes=prefixes,
                    share=name if shared else "",
                    **kinds,
                )
                for batch in grid()
            ]
        )
        tokens.append(sum(run_tokens))
        if chunk:
            assert max(run_tokens) <= max(chunk, 3)
    assert answers[0] == answers[1]
    assert len({tuple(row) for batch in answers[0] for row in batch}) > 8  # not one answer for all
    whole = [sum(map(len, batch)) for batch in grid()]
    assert tokens[0] == sum(whole)
    first = 290 + sum(len(p) - 290 for p in grid()[0])  # the haystack once
    second = sum(len(p) - 211 for p in grid()[1])  # all of the haystack before the needle is there
    third = sum(len(p) - 96 for p in grid()[2])
    assert tokens[1] <= first + second + third + whole[3] + whole[4] + 200 + 1 + 1
    assert tokens[1] < 0.75 * tokens[0]


def test_other_plans_share_nothing(model: CausalLM, run_tokens: list[int]) -> None:
    """Keys under MoBA are not those under full attention: from the second layer on they differ."""
    kinds: dict[str, Any] = {"max_new_tokens": 4, "eos_id": None, "decode_plans": PLANS["full"]}
    prefixes = Prefixes()
    batch = grid()[0][:1]
    for name in ("full", "moba", "moba"):
        shared = generate(model, batch, prefill_plans=PLANS[name], prefixes=prefixes, share=name, **kinds)
        assert shared == generate(model, batch, prefill_plans=PLANS[name], **kinds)
    assert run_tokens == [len(batch[0])] * 4 + [1, len(batch[0])]


def test_memory_is_given_back(model: CausalLM) -> None:
    kinds: dict[str, Any] = {
        "max_new_tokens": 1,
        "eos_id": None,
        "prefill_plans": PLANS["full"],
        "decode_plans": PLANS["full"],
    }
    prefixes = Prefixes()
    generate(model, grid()[0], prefixes=prefixes, share="full", **kinds)
    assert prefixes.stored is not None and prefixes.stored.keys[0].shape == (312, 2, 8)
    generate(model, grid()[0], prefixes=prefixes, **kinds)
    assert prefixes.stored is None and prefixes.tokens is None


def test_nothing_is_kept_where_memory_is_short(
    model: CausalLM, run_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: dict[str, Any] = {"max_new_tokens": 3, "eos_id": None, "share": "full"}
    kinds |= {"prefill_plans": PLANS["full"], "decode_plans": PLANS["full"]}
    row = 2 * 2 * 312 * 2 * 8 * 4  # k and v, layers, tokens, kv heads, head_dim, fp32
    answers = []
    for room in (row, row - 1):
        monkeypatch.setattr("eval.prefixes._room", lambda device, room=room: room)
        prefixes = Prefixes()
        run_tokens.clear()
        answers.append([generate(model, grid()[0][:1], prefixes=prefixes, **kinds) for _ in range(2)])
        assert run_tokens == ([312, 1] if room == row else [312, 312])
        assert (prefixes.stored is None) == (room < row)
    assert answers[0] == answers[1]


def test_a_key_convolution_shares_nothing() -> None:
    model, prefixes = model_of(3), Prefixes()
    kinds: dict[str, Any] = {
        "max_new_tokens": 3,
        "eos_id": None,
        "prefill_plans": PLANS["moba"],
        "decode_plans": PLANS["full"],
    }
    for batch in grid()[:2]:
        shared = generate(model, batch, prefixes=prefixes, share="moba", **kinds)
        assert shared == generate(model, batch, **kinds)
    cache = KVCache(model.config, [99], 1, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="key convolution"):
        cache.begin_with(10)


def test_a_prompt_needs_a_token_of_its_own(model: CausalLM) -> None:
    cache = KVCache(model.config, [MIN_SHARED, 99], 1, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="need more"):
        cache.begin_with(MIN_SHARED)
