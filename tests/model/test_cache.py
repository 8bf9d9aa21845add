from __future__ import annotations

from typing import Any

import pytest
import torch

from conf.schema import RopeConfig
from model.cache import KVCache
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM, Plans
from tests.model.build import VOCAB, tiny_config, tiny_model

MOBA = LayerPlan("moba", 16, 2)
LENGTHS = [37, 1, 16, 64, 95]
STEPS = 36  # every row crosses at least two block borders


def uncached(model: CausalLM, tokens: torch.Tensor, plans: Plans) -> torch.Tensor:
    """Logits after each token of one sequence, [S, V]."""
    length = tokens.numel()
    args: dict[str, Any] = {
        "input_ids": tokens[None],
        "positions": torch.arange(length)[None],
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        "max_seqlen": length,
    }
    with torch.no_grad():
        return model.logits(model.hidden(**args, plans=plans))[0]


def new_cache(model: CausalLM, lengths: list[int], room: int) -> KVCache:
    return KVCache(model.config, lengths, room, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    "plans",
    [(FULL, FULL), (MOBA, MOBA), (MOBA, FULL), (LayerPlan("moba", 16, 1),) * 2, (LayerPlan("moba", 16, 99),) * 2],
    ids=["full", "moba", "hybrid", "own_block", "all_blocks"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cached_logits_equal_uncached_ones(family: str, plans: Plans) -> None:
    """Prompts of unequal length, teacher forced: every step's logits are those of the whole sequence."""
    model = tiny_model(tiny_config(family), RopeConfig(kind="linear", factor=2.0))
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (len(LENGTHS), max(LENGTHS) + STEPS))
    want = [uncached(model, row[: n + STEPS], plans) for row, n in zip(tokens, LENGTHS, strict=True)]
    cache = new_cache(model, LENGTHS, STEPS)
    logits = model.prefill(tokens[:, : max(LENGTHS)], cache, plans)
    rows = range(len(LENGTHS))
    for step in range(STEPS):
        expected = torch.stack([want[r][LENGTHS[r] - 1 + step] for r in rows])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        following = torch.stack([tokens[r, LENGTHS[r] + step] for r in rows])
        logits = model.decode(following[:, None], cache, plans)
    assert cache.lengths == [length + STEPS for length in LENGTHS]
    torch.testing.assert_close(logits, torch.stack([want[r][-1] for r in rows]), rtol=1e-4, atol=1e-4)


def test_moba_decode_is_not_full_decode() -> None:
    """Guards the test above: with these weights the two plans give different logits."""
    model = tiny_model()
    tokens = torch.randint(0, VOCAB, (1, 96), generator=torch.Generator().manual_seed(1))
    assert (uncached(model, tokens[0], (MOBA,) * 2) - uncached(model, tokens[0], (FULL,) * 2)).abs().max() > 0.1


def test_plan_may_change_between_steps() -> None:
    """Block means are made from the stored keys when they are first needed, for any block size."""
    model = tiny_model()
    tokens = torch.randint(0, VOCAB, (1, 90), generator=torch.Generator().manual_seed(1))
    one_layer_in = new_cache(model, [80], 10)
    model.prefill(tokens[:, :80], one_layer_in, (FULL, FULL))
    for step, plans in enumerate([(FULL, MOBA), (FULL, LayerPlan("moba", 32, 2)), (FULL, FULL), (FULL, MOBA)]):
        got = model.decode(tokens[:, 80 + step, None], one_layer_in, plans)
        # The last layer's choice does not reach the cache, so the uncached run under this plan is the truth.
        torch.testing.assert_close(
            got[0], uncached(model, tokens[0, : 81 + step], plans)[-1], rtol=1e-4, atol=1e-4
        )


def test_padding_is_ignored() -> None:
    model = tiny_model()
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    outs = []
    for padding in (0, VOCAB - 1):
        padded = tokens.clone()
        padded[1, 5:] = padding
        cache = new_cache(model, [20, 5], 1)
        outs.append([model.prefill(padded, cache, (MOBA,) * 2), model.decode(tokens[:, :1], cache, (MOBA,) * 2)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_phases_are_explicit() -> None:
    model = tiny_model()
    tokens = torch.zeros(1, 4, dtype=torch.long)
    cache = new_cache(model, [4], 1)
    with pytest.raises(ValueError, match="prefill phase"):
        model.decode(tokens[:, :1], cache, (FULL,) * 2)
    model.prefill(tokens, cache, (FULL,) * 2)
    with pytest.raises(ValueError, match="decode phase"):
        model.prefill(tokens, cache, (FULL,) * 2)
    with pytest.raises(ValueError, match="one token per row"):
        model.decode(tokens, cache, (FULL,) * 2)
    model.decode(tokens[:, :1], cache, (FULL,) * 2)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.decode(tokens[:, :1], cache, (FULL,) * 2)


def test_impossible_prompts() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="at least one token"):
        new_cache(model, [3, 0], 1)
    with pytest.raises(ValueError, match="do not hold"):
        model.prefill(torch.zeros(1, 4, dtype=torch.long), new_cache(model, [5], 1), (FULL,) * 2)


@pytest.mark.parametrize("chunk", [1, 7, 40, 64, 150])
@pytest.mark.parametrize(
    "plans",
    [(FULL, FULL), (MOBA, FULL), (MOBA, LayerPlan("moba", 16, 3, "window"))],
    ids=["full", "hybrid", "choosers"],
)
def test_prefill_in_parts_equals_prefill(plans: Plans, chunk: int) -> None:
    """Logits, keys and everything decoded after them; rows end in different parts."""
    config = tiny_config("qwen3")
    config.key_conv = 3
    model = tiny_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "key_conv" in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(0, VOCAB, (len(LENGTHS), max(LENGTHS) + 3), generator=torch.Generator().manual_seed(4))
    whole, parts = new_cache(model, LENGTHS, 3), new_cache(model, LENGTHS, 3)
    expected = model.prefill(tokens[:, : max(LENGTHS)], whole, plans)
    got = model.prefill(tokens[:, : max(LENGTHS)], parts, plans, chunk=chunk)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for layer in range(2):
        torch.testing.assert_close(parts.keys[layer], whole.keys[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(parts.values[layer], whole.values[layer], rtol=1e-4, atol=1e-4)
    for step in range(3):
        following = tokens[:, step, None]
        torch.testing.assert_close(
            model.decode(following, parts, plans), model.decode(following, whole, plans), rtol=1e-4, atol=1e-4
        )


def test_parts_cover_the_prompts_once() -> None:
    cache = new_cache(tiny_model(), LENGTHS, 1)
    seen: dict[int, list[int]] = {row: [] for row in range(len(LENGTHS))}
    sizes = []
    for part in cache.parts(20):
        sizes.append(sum(end - first for _, first, end in part))
        for row, first, end in part:
            seen[row] += range(first, end)
    assert seen == {row: list(range(n)) for row, n in enumerate(LENGTHS)}
    assert max(sizes) <= 20 and cache.part == []
    assert list(cache.parts(0)) == list(cache.parts(1000)) == [[(row, 0, n) for row, n in enumerate(LENGTHS)]]
