"""Every ZeRO stage on two processes equals plain PyTorch on one, clipping and uneven token counts included."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from conf.errors import UserError
from conf.schema import RopeConfig
from model.schedule import plan
from model.transformer import CausalLM
from tests.gloo import GlooPool
from tests.train.jobs import STEPS, global_batch, rows_of, tiny_config, train
from train.engine import deepspeed_config, micro_batches_per_step
from train.optim import build_adamw, lr_at

FP32 = {"rtol": 1e-5, "atol": 1e-5}


@cache
def oracle(tied: bool = False) -> dict[str, Any]:
    """Five steps in plain PyTorch: the whole global batch at once, no DeepSpeed, no process group."""
    config = tiny_config(tied=tied)
    stage = config.stages["one"]
    model = CausalLM(config.model, RopeConfig(), stage.attention.backend)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    adamw = build_adamw(model, config.optim)
    plans = plan(stage.attention, 2, 0.0)
    result: dict[str, Any] = {"loss": [], "grad_norm": [], "valid": []}
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = lr_at(stage.lr, (step + 1) * stage.tokens // STEPS, stage.tokens)
        batch = global_batch(step)
        out = model(
            batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens, batch.max_seqlen, plans
        )  # fmt: skip
        loss = out.loss_sum / out.num_valid
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        adamw.step()
        for key, value in (("loss", loss), ("grad_norm", norm), ("valid", out.num_valid)):
            result[key].append(value.item())
    result["tensors"] = {f":{name}": p.detach().numpy() for name, p in model.named_parameters()}
    return result


def assert_equal_runs(got: dict[str, Any], want: dict[str, Any], rtol: float, atol: float) -> None:
    assert got["valid"] == want["valid"]
    np.testing.assert_allclose(got["loss"], want["loss"], rtol, atol)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol, atol)
    for name, tensor in want["tensors"].items():
        np.testing.assert_allclose(got["tensors"][name], tensor, rtol, atol, err_msg=name)


def test_the_case_is_hard_enough() -> None:
    """Clipping bites in every step, and the two ranks' token counts differ by more than half."""
    assert min(oracle()["grad_norm"]) > tiny_config().optim.clip
    for step in range(STEPS):
        first, second = (rows_of(global_batch(step), slice(r, r + 2)).num_valid for r in (0, 2))
        assert first < second / 2


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_fp32_equals_plain_pytorch(pools: dict[int, GlooPool], world: int, zero_stage: int) -> None:
    for result in pools[world](train, zero_stage):
        assert_equal_runs(result, oracle(), **FP32)
        assert result["optimizer_step"] == STEPS


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_tied_embeddings(pool2: GlooPool, zero_stage: int) -> None:
    for result in pool2(train, zero_stage, "fp32", None, "", "", True):
        assert_equal_runs(result, oracle(tied=True), **FP32)


def test_bf16_stages_agree(pool2: GlooPool) -> None:
    """One optimizer in all three (same step count, no hidden first step), close to fp32."""
    results = {zero_stage: pool2(train, zero_stage, "bf16")[0] for zero_stage in (1, 2, 3)}
    for result in results.values():
        assert result["optimizer_step"] == STEPS
        np.testing.assert_allclose(result["loss"], results[1]["loss"], rtol=2e-3)
        np.testing.assert_allclose(result["grad_norm"], results[1]["grad_norm"], rtol=1e-2)
        np.testing.assert_allclose(result["loss"], oracle()["loss"], rtol=5e-3)
        np.testing.assert_allclose(result["grad_norm"], oracle()["grad_norm"], rtol=3e-2)


def test_bf16_starts_from_the_unrounded_weights(pool2: GlooPool) -> None:
    """Masters after zero steps are the fp32 draw, not its bf16 rounding."""
    config = tiny_config()
    model = CausalLM(config.model, RopeConfig(), "reference")
    model.init_weights(torch.Generator().manual_seed(config.seed))
    for zero_stage in (1, 2, 3):
        got = pool2(train, zero_stage, "bf16", 0)[0]
        assert got["optimizer_step"] == 0
        for name, param in model.named_parameters():
            np.testing.assert_array_equal(got["tensors"][f":{name}"], param.detach().numpy())
            assert not got["tensors"][f"exp_avg:{name}"].any()


def test_stage_0_with_bf16_is_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage 1, 2 or 3"):
        deepspeed_config(tiny_config(0, "bf16"), 1, 1, 1000)


def test_micro_batches_per_step() -> None:
    assert micro_batches_per_step(16, 2, 4) == 2
    for rows, micro, world in ((6, 2, 2), (1, 1, 2)):
        with pytest.raises(UserError, match="global_batch"):
            micro_batches_per_step(rows, micro, world)
