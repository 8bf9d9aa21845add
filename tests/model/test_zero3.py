"""Head, tied embeddings and loss under DeepSpeed ZeRO-3, whose hooks gather and release parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conf.schema import RopeConfig
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM
from tests.gloo import GlooPool
from tests.model.build import packed, tiny_config

LENGTHS = [[40, 24], [64]]  # one row per rank: 62 and 63 labels
PLANS = (LayerPlan("moba", 16, 2), FULL)
STEPS = 3
Run = tuple[list[float], dict[str, torch.Tensor], float]


def new_model(tied: bool) -> CausalLM:
    import model.loss

    model.loss.TILE_BYTES = 0  # one token per tile: many recomputations in backward
    built = CausalLM(tiny_config(tie_embeddings=tied, init_std=0.05), RopeConfig())
    built.init_weights(torch.Generator().manual_seed(0))
    return built


def rows() -> list[dict[str, Any]]:
    return [packed([lengths], seed=index) for index, lengths in enumerate(LENGTHS)]


def alone(tied: bool) -> Run:
    """Both rows in one process."""
    model = new_model(tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    total = sum(int((row["labels"] >= 0).sum()) for row in rows())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.stack([model(**row, plans=PLANS).loss_sum for row in rows()]).sum() / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        after = float(model.token_losses(**rows()[0], plans=PLANS).sum())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}, after


def under_zero3(tied: bool) -> Run:
    """One row per rank; loss scaled as the trainer scales it. token_losses between backward and step, too."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = new_model(tied)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        # 0: every parameter is partitioned, none stays whole because it is small
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    row = rows()[dist.get_rank()]
    total = sum(int((r["labels"] >= 0).sum()) for r in rows())
    losses = []
    for _ in range(STEPS):
        loss_sum = engine(**row, plans=PLANS).loss_sum
        engine.backward(loss_sum / total * dist.get_world_size(), scale_wrt_gas=False)
        engine.step()
        whole = loss_sum.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / total)
    with torch.no_grad():
        after = float(engine.module.token_losses(**rows()[0], plans=PLANS).sum())
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            weights[name] = parameter.detach().clone()
    engine.destroy()
    return losses, weights, after


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("tied", [False, True])
def test_zero3_equals_one_process(pool: GlooPool, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.loss.TILE_BYTES", 0)
    losses, weights, after = alone(tied)
    for got_losses, got_weights, got_after in pool(under_zero3, tied):
        assert got_losses == pytest.approx(losses, rel=1e-5)
        assert got_after == pytest.approx(after, rel=1e-5)
        assert got_weights.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(got_weights[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert losses[-1] < losses[0]
