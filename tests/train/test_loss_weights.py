"""Weighted losses: the weighted mean and its gradients, however rows, columns and micro-batches are shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.constants import IGNORE_INDEX
from conf.schema import RopeConfig, TrainConfig
from data.batch import Batch
from model.schedule import plan
from model.transformer import CausalLM
from tests.gloo import GlooPool
from tests.tolerances import assert_close
from tests.train import jobs, sp_jobs


def weighted(batch: Batch, step: int) -> Batch:
    """Weights from 0.1 to 3 on the labels, the first row's far above the others'."""
    draw = torch.Generator().manual_seed(step)
    weights = 0.1 + 2.9 * torch.rand(batch.labels.shape, generator=draw)
    weights[0] *= 10
    return replace(batch, weights=torch.where(batch.labels == IGNORE_INDEX, 0.0, weights))


def ones(batch: Batch) -> Batch:
    return replace(batch, weights=(batch.labels != IGNORE_INDEX).float())


def losses(model: CausalLM, config: TrainConfig, batch: Batch, **options: Any) -> Any:
    plans = plan(config.stages["one"].attention, config.model.num_layers, 0.0)
    b = batch
    return model(b.input_ids, b.labels, b.positions, b.cu_seqlens, b.max_seqlen, plans, **options)


def model_of(config: TrainConfig) -> CausalLM:
    model = CausalLM(config.model, RopeConfig(), config.stages["one"].attention.backend)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model


def gradients(model: CausalLM, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_sums_equal_the_sum_token_by_token() -> None:
    config = jobs.tiny_config()
    model, batch = model_of(config), weighted(jobs.global_batch(0), 0)
    assert batch.weights is not None
    out = losses(model, config, batch, trailing=8, weights=batch.weights)
    plain = losses(model, config, batch, trailing=8)
    each = losses(model, config, batch, per_token=True)
    want = sum(w * x for w, x in zip(batch.weights.flatten().tolist(), each.flatten().tolist(), strict=True))
    assert float(out.loss_sum.detach()) == pytest.approx(want, rel=1e-6)
    assert float(out.weight_sum) == pytest.approx(float(batch.weights.double().sum()), rel=1e-6)
    assert int(out.num_valid) == int(plain.num_valid) == batch.num_valid
    assert float(out.trailing_sum) == float(plain.trailing_sum)  # a measure: not weighted
    got = gradients(model, out.loss_sum / out.weight_sum)
    oracle = gradients(
        model, (losses(model, config, batch, per_token=True) * batch.weights).sum() / batch.weight_sum
    )
    for a, b in zip(got, oracle, strict=True):
        assert_close(a, b, "gradient")


def test_ones_are_bit_equal_to_no_weights() -> None:
    config = jobs.tiny_config()
    model, batch = model_of(config), jobs.global_batch(0)
    plain, weights = losses(model, config, batch), ones(batch).weights
    got = losses(model, config, batch, weights=weights)
    assert torch.equal(got.loss_sum, plain.loss_sum) and float(got.weight_sum) == int(plain.num_valid)
    for a, b in zip(gradients(model, got.loss_sum), gradients(model, losses(model, config, batch).loss_sum),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def stream_of(kind: str, rank: int, world: int, per_micro: int) -> Iterator[tuple[list[Batch], dict[str, Any]]]:
    share = jobs.GLOBAL_BATCH // world
    for step in range(jobs.STEPS):
        whole = jobs.global_batch(step)
        batch = {"weighted": weighted(whole, step), "ones": ones(whole), "none": whole}[kind]
        micro = []
        for first in range(rank * share, (rank + 1) * share, per_micro):
            rows = slice(first, first + per_micro)
            part = jobs.rows_of(batch, rows)
            micro.append(part if batch.weights is None else replace(part, weights=batch.weights[rows]))
        if kind == "weighted" and step == 2:  # rows without weights among rows with them
            micro[0] = replace(micro[0], weights=None) if rank == 0 and per_micro == 1 else micro[0]
        yield micro, {"stage_step": step + 1}


def train(kind: str, sequence_parallel: int, per_micro: int, zero_stage: int = 0) -> list[dict[str, Any]]:
    from train.loop import fit

    config = sp_jobs.train_config(zero_stage, sequence_parallel)
    config.stages["one"].micro_batch = per_micro
    run = jobs.make_run(config)
    run.batches = stream_of(kind, run.mesh.dp_rank, run.mesh.dp_world, per_micro)
    fit(run)
    run.engine.destroy()
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in run.rows]


def train_alone(per_micro: int) -> list[tuple[float, float]]:
    """The same in plain PyTorch, the whole global batch at once: (loss, gradient norm) of each step."""
    from train.optim import build_adamw, lr_at

    config = sp_jobs.train_config(0, 1)
    stage, model = config.stages["one"], model_of(config)
    adamw, found = build_adamw(model, config.optim), []
    for step in range(sp_jobs.STEPS):
        for group in adamw.param_groups:
            group["lr"] = lr_at(stage.lr, (step + 1) * jobs.GLOBAL_BATCH * jobs.SEQ_LEN, stage.tokens)
        batch = weighted(jobs.global_batch(step), step)
        assert batch.weights is not None
        if step == 2 and per_micro == 1:
            batch.weights[0] = (batch.labels[0] != IGNORE_INDEX).float()
        loss = (losses(model, config, batch, per_token=True) * batch.weights).sum() / batch.weights.sum()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        adamw.step()
        found.append((float(loss.detach()), float(norm)))
    return found


@pytest.mark.parametrize(("sequence_parallel", "per_micro", "zero_stage"), [(1, 1, 0), (2, 1, 2), (2, 2, 0)])
def test_any_sharing_trains_on_the_weighted_mean(
    pool4: GlooPool, sequence_parallel: int, per_micro: int, zero_stage: int
) -> None:
    """Four ranks: data parallel with one row each, or two pairs that share rows, accumulating or not."""
    want = np.array(train_alone(per_micro))
    for rows in pool4(train, "weighted", sequence_parallel, per_micro, zero_stage):
        got = np.array([(row["loss"], row["grad_norm"]) for row in rows])
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert all(row["loss_weight"] != row["valid_tokens"] for row in rows)


def test_ones_train_bit_equal_to_no_weights(pool2: GlooPool) -> None:
    with_ones, without = pool2(train, "ones", 1, 1), pool2(train, "none", 1, 1)
    assert with_ones == without
    assert "loss_weight" not in without[0][0]
