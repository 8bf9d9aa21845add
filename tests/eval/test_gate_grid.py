"""The grid of what-ifs against loops, and against the statistics of the gate itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig, RopeConfig
from data.batch import Batch
from eval.gate_grid import gate_grid, grid_cells
from model.schedule import LayerPlan, full_plans
from model.transformer import CausalLM

T = 150


@pytest.fixture(scope="module")
def model() -> CausalLM:
    shape: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2}
    config = ModelConfig(**shape, num_heads=4, num_kv_heads=2, init_std=0.5)
    model = CausalLM(config, RopeConfig()).eval()
    model.init_weights(torch.Generator().manual_seed(5))
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    ids = torch.randint(0, 40, (1, T), generator=torch.Generator().manual_seed(1))
    return Batch(ids, ids, torch.arange(T)[None], torch.tensor([0, T], dtype=torch.int32), T)


def seen_under_full_attention(model: CausalLM, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """q and k of both layers, taken where full attention takes them."""
    import model.attention as attention

    found: list[tuple[Tensor, Tensor]] = []
    plain = attention.full_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **kinds: Any) -> Tensor:
        found.append((q, k))
        return plain(q, k, v, **kinds)

    attention.full_attention = spy
    try:
        with torch.no_grad():
            model.hidden(batch.input_ids, batch.positions, batch.cu_seqlens, T, full_plans(2))
    finally:
        attention.full_attention = plain
    return found


def test_against_loops(model: CausalLM, batch: Batch) -> None:
    rows = gate_grid(model, batch, [16, 48], [1, 2, 3], queries=10**6)
    assert [(row["block_size"], row["topk"]) for row in rows] == [
        (48, 1),
        (48, 2),
        (48, 3),
        (16, 1),
        (16, 2),
        (16, 3),
    ]
    layers = seen_under_full_attention(model, batch)
    for row in rows:
        size, topk = row["block_size"], row["topk"]
        for layer, (q, k) in enumerate(layers):
            kept, best, near, count = 0.0, 0.0, 0.0, 0
            for t in range(size * topk, T):
                own = t // size
                for h in range(4):
                    keys = k[: t + 1, h // 2].double()
                    p = torch.softmax(keys @ q[t, h].double() / q.shape[2] ** 0.5, 0)
                    mass = [float(p[b * size : (b + 1) * size].sum()) for b in range(own + 1)]
                    scores = [
                        float(keys[b * size : (b + 1) * size].mean(0) @ q[t, h].double()) for b in range(own)
                    ]
                    order = sorted(range(own), key=lambda b: -scores[b])[: topk - 1]
                    kept += mass[own] + sum(mass[b] for b in order)
                    best += mass[own] + sum(sorted(mass[:own])[max(0, own - topk + 1) :] if topk > 1 else [])
                    near += sum(mass[max(0, own - topk + 1) :])
                    count += 1
            assert row["kept_by_layer"][layer] == pytest.approx(kept / count, rel=1e-4)
            if layer == 1:
                continue
            first = gate_grid(model, batch, [size], [topk], queries=10**6)[0]
            assert first == row
    assert all(row["best"] >= row["kept"] - 1e-9 for row in rows)
    assert rows[1]["read"] == pytest.approx(96 / T)


def test_full_attention_is_what_runs(model: CausalLM, batch: Batch) -> None:
    """One block over the whole document is full attention."""
    plans = (LayerPlan("moba", 160, 1),) * 2
    args = (batch.input_ids, batch.positions, batch.cu_seqlens, T)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(*args, plans), model.hidden(*args, full_plans(2)))


def test_cells() -> None:
    assert grid_cells(1024, [], [3]) == [(128, 3), (64, 3), (32, 3), (16, 3)]
    assert grid_cells(100, [64, 32], [1, 2, 4]) == [(64, 1), (32, 1), (32, 2)]
    assert grid_cells(64, [], [2]) == []
