"""Gate statistics against loops over queries, heads and blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig, RopeConfig
from data.batch import Batch
from eval.gate import LayerGate, gate_statistics, read_gates, save_gates
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM

T, BLOCK, TOPK = 150, 16, 3
NUM_BLOCKS = 10


class Seen:
    """What the probe of the same forward pass got: q, k and block ids by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, ids: Tensor) -> None:
        self.layers[layer] = (q, k, ids)


@pytest.fixture(scope="module")
def looked() -> tuple[list[LayerGate], Seen]:
    config = ModelConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        init_std=0.5,
    )
    model = CausalLM(config, RopeConfig()).eval()
    model.init_weights(torch.Generator().manual_seed(5))
    plans = (LayerPlan("moba", BLOCK, TOPK), FULL, LayerPlan("moba", BLOCK, TOPK))
    ids = torch.randint(0, 40, (1, T), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, ids, torch.arange(T)[None], torch.tensor([0, T], dtype=torch.int32), T)
    seen = Seen()
    with torch.no_grad():
        model.hidden(batch.input_ids, batch.positions, batch.cu_seqlens, T, plans, probe=seen)
    return gate_statistics(model, batch, plans, queries=10**6), seen


def chosen(ids: Tensor, t: int, h: int) -> set[int]:
    return {int(i) for i in ids[t, h] if i >= 0}


def test_only_moba_layers_have_a_gate(looked: tuple[list[LayerGate], Seen]) -> None:
    gates, _ = looked
    assert [gate.layer for gate in gates] == [0, 2]
    assert all((gate.block_size, gate.topk) == (BLOCK, TOPK) for gate in gates)


def test_picture_counts_queries(looked: tuple[list[LayerGate], Seen]) -> None:
    gates, seen = looked
    for gate in gates:
        ids = seen.layers[gate.layer][2]
        expected = np.zeros((4, NUM_BLOCKS, NUM_BLOCKS))
        for t in range(T):
            for h in range(4):
                for block in {t // BLOCK, *chosen(ids, t, h)}:
                    expected[h, t // BLOCK, block] += 1
        expected /= np.bincount(np.arange(T) // BLOCK)[None, :, None]
        np.testing.assert_allclose(gate.choice.numpy(), expected, rtol=1e-6)


def test_masses_of_full_attention(looked: tuple[list[LayerGate], Seen]) -> None:
    gates, seen = looked
    for gate in gates:
        q, k, ids = seen.layers[gate.layer]
        sums = np.zeros((4, 4))
        queries = range(TOPK * BLOCK, T)
        for t in queries:
            for h in range(4):
                scores = (k[: t + 1, h // 2].double() @ q[t, h].double()) / q.shape[2] ** 0.5
                p = torch.softmax(scores, 0)
                mass = [float(p[b * BLOCK : (b + 1) * BLOCK].sum()) for b in range(t // BLOCK + 1)]
                own = t // BLOCK
                sums[0, h] += mass[own] + sum(mass[b] for b in chosen(ids, t, h))
                sums[1, h] += mass[own] + sum(sorted(mass[:own])[-(TOPK - 1) :])
                sums[2, h] += sum(mass[own - TOPK + 1 :])
                sums[3, h] += mass[own]
        assert gate.queries == len(queries)
        measured = [gate.mass_kept, gate.mass_best, gate.mass_window, gate.mass_own]
        np.testing.assert_allclose(measured, sums / len(queries), rtol=1e-4)
        assert all(
            best >= kept >= own for best, kept, own in zip(measured[1], measured[0], measured[3], strict=True)
        )


def test_statistics_of_the_choices(looked: tuple[list[LayerGate], Seen]) -> None:
    gates, seen = looked
    for gate in gates:
        ids = seen.layers[gate.layer][2]
        load = np.zeros((4, NUM_BLOCKS - 1))
        distance = np.zeros(NUM_BLOCKS - 1)
        overlaps = []
        for t in range(T):
            sets = [chosen(ids, t, h) for h in range(4)]
            for h, blocks in enumerate(sets):
                for block in blocks:
                    load[h, block] += 1
                    distance[t // BLOCK - block - 1] += 1
            if t // BLOCK > TOPK - 1:
                overlaps += [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in ((0, 1), (2, 3))]
        share = load / load.sum(1, keepdims=True)
        entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(1) / np.log(NUM_BLOCKS - 1)
        np.testing.assert_allclose(gate.entropy, entropy, rtol=1e-6)
        np.testing.assert_allclose(gate.never, (load == 0).mean(1))
        np.testing.assert_allclose(gate.load_max, load.max(1) / load.mean(1), rtol=1e-6)
        np.testing.assert_allclose(gate.distance, distance / distance.sum(), rtol=1e-6)
        assert gate.agreement == pytest.approx(np.mean(overlaps), rel=1e-5)


def test_pictures_survive_saving(looked: tuple[list[LayerGate], Seen], tmp_path: Path) -> None:
    gates, _ = looked
    save_gates(tmp_path / "gate.npz", gates)
    again = read_gates(tmp_path / "gate.npz", [gate.to_json() for gate in gates])
    for before, after in zip(gates, again, strict=True):
        assert torch.allclose(before.choice, after.choice, atol=1e-3)
        assert before.to_json() == after.to_json()
    assert read_gates(tmp_path / "none.npz", []) == []


def test_a_document_too_short_to_choose(looked: tuple[list[LayerGate], Seen]) -> None:
    config = ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1
    )
    model = CausalLM(config, RopeConfig()).eval()
    model.init_weights(torch.Generator().manual_seed(5))
    ids = torch.zeros(1, 20, dtype=torch.int64)
    batch = Batch(ids, ids, torch.arange(20)[None], torch.tensor([0, 20], dtype=torch.int32), 20)
    (gate,) = gate_statistics(model, batch, (LayerPlan("moba", 16, 4),), queries=8)
    assert gate.queries == 0 and gate.mass_kept == [] and gate.agreement is None
    two = Batch(ids, ids, torch.arange(20)[None], torch.tensor([0, 8, 20], dtype=torch.int32), 12)
    with pytest.raises(ValueError, match="one document"):
        gate_statistics(model, two, (LayerPlan("moba", 16, 4),), queries=8)
