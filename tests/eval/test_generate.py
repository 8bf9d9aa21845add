"""Greedy generation with the cache against greedy generation without one."""

from __future__ import annotations

import pytest
import torch

from conf.schema import ModelConfig, RopeConfig
from eval.generate import generate
from model.schedule import LayerPlan, full_plans
from model.transformer import CausalLM

FULL = full_plans(2)
MOBA = (LayerPlan("moba", 16, 2),) * 2


@pytest.fixture(scope="module")
def model() -> CausalLM:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        init_std=0.4,
    )
    model = CausalLM(config, RopeConfig())
    model.init_weights(torch.Generator().manual_seed(3))
    return model.eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def uncached(model: CausalLM, prompt: list[int], steps: int, plans: tuple[LayerPlan, ...]) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        row = torch.tensor([ids])
        borders = torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden = model.hidden(row, torch.arange(len(ids))[None], borders, len(ids), plans)
        ids.append(int(model.logits(hidden[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("plans", [FULL, MOBA], ids=["full", "moba"])
def test_equals_generation_without_a_cache(model: CausalLM, plans: tuple[LayerPlan, ...]) -> None:
    batch = prompts(1, 75, 16, 48)
    new = generate(model, batch, max_new_tokens=12, eos_id=None, prefill_plans=plans, decode_plans=plans)
    assert new == [uncached(model, prompt, 12, plans) for prompt in batch]
    assert len({tuple(row) for row in new}) == 4  # not one answer for all


def test_prefill_and_decode_follow_their_own_plans(model: CausalLM) -> None:
    batch = prompts(100)
    by_plans = {
        (name, other): generate(model, batch, max_new_tokens=10, eos_id=None, prefill_plans=a, decode_plans=b)
        for name, a in (("full", FULL), ("moba", MOBA))
        for other, b in (("full", FULL), ("moba", MOBA))
    }
    assert by_plans["full", "full"] != by_plans["moba", "full"]
    assert by_plans["moba", "full"] != by_plans["moba", "moba"]


def test_rows_do_not_influence_each_other(model: CausalLM) -> None:
    batch = prompts(5, 70)
    kinds = {"max_new_tokens": 9, "eos_id": None, "prefill_plans": MOBA, "decode_plans": FULL}
    assert generate(model, batch, **kinds) == [generate(model, [p], **kinds)[0] for p in batch]


def test_stops_at_eos(model: CausalLM) -> None:
    batch = prompts(12, 30)
    kinds = {"max_new_tokens": 10, "prefill_plans": FULL, "decode_plans": FULL}
    free = generate(model, batch, eos_id=None, **kinds)
    eos = free[0][4]
    stopped = generate(model, batch, eos_id=eos, **kinds)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]
    assert generate(model, batch, eos_id=[eos], **kinds) == stopped
    either = generate(model, batch, eos_id=[eos, free[0][2]], **kinds)
    assert len(either[0]) <= 2 and all(not {eos, free[0][2]} & set(row) for row in either)
    assert len(stopped[0]) <= 4


def test_refuses_nothing_to_do(model: CausalLM) -> None:
    kinds = {"eos_id": None, "prefill_plans": FULL, "decode_plans": FULL}
    assert generate(model, [], max_new_tokens=3, **kinds) == []
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, prompts(3), max_new_tokens=0, **kinds)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[]], max_new_tokens=3, **kinds)
