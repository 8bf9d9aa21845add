from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import ModelConfig
from model.flops import attended_pairs, flops_per_token, kv_bytes, scored_blocks
from model.schedule import FULL, LayerPlan, full_plans
from model.shapes import num_parameters
from tests.model.build import hidden_args, packed, tiny_config, tiny_model

LLAMA_8B = ModelConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8
)


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("topk", [1, 2, 3, 50])
def test_pairs_by_counting(seq_len: int, topk: int) -> None:
    block = 16
    pairs = sum(t % block + 1 + min(t // block, topk - 1) * block for t in range(seq_len))
    assert attended_pairs(seq_len, LayerPlan("moba", block, topk)) == pairs
    assert scored_blocks(seq_len, LayerPlan("moba", block, topk)) == sum(t // block for t in range(seq_len))
    if topk * block >= seq_len:
        assert pairs == attended_pairs(seq_len, FULL) == seq_len * (seq_len + 1) // 2


def test_published_sizes() -> None:
    assert num_parameters(LLAMA_8B) == 8_030_261_248
    assert kv_bytes(LLAMA_8B, 1_048_576) == 128 * 2**30
    flops = flops_per_token(LLAMA_8B, 8192, full_plans(32))
    assert flops.dense == 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096)
    assert flops.attention == pytest.approx(6 * 2 * 32 * 4096 * 8193 / 2)
    assert flops.total == flops.dense + flops.attention
    assert flops_per_token(LLAMA_8B, 8192, full_plans(32), training=False).total * 3 == flops.total


def test_dense_part_against_torchs_counter() -> None:
    config = tiny_config()
    model = tiny_model(config)
    batch = hidden_args(packed([[64]]))
    plans = full_plans(2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model.hidden(**batch, plans=plans))  # type: ignore[arg-type]
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    dense = sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    assert dense == 64 * flops_per_token(config, 64, plans, training=False).dense


def test_moba_costs_less_attention_and_a_gate() -> None:
    plans = (LayerPlan("moba", 4096, 12),) * 29 + full_plans(3)
    moba, full = flops_per_token(LLAMA_8B, 1_048_576, plans), flops_per_token(LLAMA_8B, 1_048_576, full_plans(32))
    assert moba.dense == full.dense
    assert moba.attention < 0.2 * full.attention
    assert 0 < moba.gate < 0.01 * moba.attention
