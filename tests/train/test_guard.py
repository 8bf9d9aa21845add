"""Bad steps: injected faults on one rank, the same decision on all, and no update from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.paths import RunPaths
from conf.schema import OptimConfig
from tests.gloo import GlooPool
from tests.train import fault_jobs, jobs
from tests.train.test_run import rows_of, weights_of
from train.optim import GuardedAdamW

AT = 3  # step of the stage, from 0, whose data is bad


def rows(out: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, RunPaths(out).metrics.read_text().splitlines()) if row["kind"] == kind]


@pytest.mark.parametrize(
    ("zero_stage", "precision", "sp"),
    [(0, "fp32", 1), (1, "fp32", 1), (2, "fp32", 2), (3, "fp32", 1), (1, "bf16", 1), (2, "bf16", 1)],
)
@pytest.mark.parametrize("fault", ["nan_loss", "inf_gradient"])
def test_skip(
    pool2: GlooPool, prepared: Path, tmp_path: Path, zero_stage: int, precision: str, sp: int, fault: str
) -> None:
    config = jobs.chain_config(str(tmp_path), str(prepared), zero_stage=zero_stage)
    config.engine.precision, config.mesh.sequence_parallel, config.eval.tokens = precision, sp, 0
    config.guard.nonfinite = "skip"
    results = pool2(fault_jobs.faulty, config, fault, AT, sp)
    assert [result.get("code") for result in results] == [0, 0], results
    bad = rows(tmp_path, "bad")
    assert [(row["step"], row["stage_step"], row["samples"], row["action"]) for row in bad] == [
        (4, 3, [12, 16], "skip")
    ]
    assert "not finite" in bad[0]["reason"]
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 3, 5, 6]
    assert fault_jobs.state_of(config, 6)["optimizer_step"] == 5
    assert all(np.isfinite(tensor).all() for tensor in weights_of(tmp_path, 6).values())


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_stop_and_rollback(pool2: GlooPool, prepared: Path, tmp_path: Path, action: str) -> None:
    alone, out = tmp_path / "alone", tmp_path / "bad"
    config = jobs.chain_config(str(alone), str(prepared), zero_stage=2)
    assert pool2(jobs.stage, config, "short") == [0, 0]
    config.out, config.guard.nonfinite, config.guard.leave_out = str(out), action, 2
    results = pool2(fault_jobs.faulty, config, "nan_loss", AT)
    before = rows_of(alone, "train")
    if action == "stop":
        assert all("step 4, samples 12 to 16 of short: loss nan" in result["error"] for result in results)
        assert rows_of(out, "train") == before[:3]
        assert not (RunPaths(out).checkpoints / "step-00000004").exists()
        return
    assert [result.get("code") for result in results] == [0, 0], results
    assert "WARNING: step 4: loss nan" in results[0]["said"] and not results[1]["said"]
    event = json.loads(RunPaths(out).guard.read_text())
    assert (event["action"], event["left_out"]) == ("rollback", [2, 4])
    after = rows_of(out, "train")
    assert after[:2] == before[:2] and [row["step"] for row in after] == [1, 2, 5, 6]
    left_out = [row["step"] for row in rows(out, "bad") if row["action"] == "left out"]
    assert left_out == [3, 4] and fault_jobs.state_of(config, 6)["optimizer_step"] == 4


def test_rollbacks_are_limited(pool2: GlooPool, prepared: Path, tmp_path: Path) -> None:
    config = jobs.chain_config(str(tmp_path), str(prepared))
    config.guard.nonfinite, config.guard.limit = "rollback", 0
    results = pool2(fault_jobs.faulty, config, "nan_loss", AT)
    assert all("1 rollbacks, guard.limit=0" in result["error"] for result in results)


def test_a_spike_is_skipped(pool2: GlooPool, prepared: Path, tmp_path: Path) -> None:
    config = jobs.chain_config(str(tmp_path), str(prepared), zero_stage=1)
    config.stages["short"].tokens = 12 * 128
    config.guard.spike, config.guard.window, config.guard.spike_factor = "skip", 4, 3.0
    results = pool2(fault_jobs.faulty, config, "spike", 8)
    assert [result.get("code") for result in results] == [0, 0], results
    bad = rows(tmp_path, "bad")
    assert [row["step"] for row in bad] == [9] and "above the limits" in bad[0]["reason"]
    assert fault_jobs.state_of(config, 12)["optimizer_step"] == 11


@pytest.mark.parametrize("fused", [False, True])
def test_vetoed_updates_change_nothing(fused: bool) -> None:
    """Also in the fused step, where the device decides."""
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = GuardedAdamW([weight], lr=0.1, weight_decay=OptimConfig().weight_decay, fused=fused)
    veto = torch.zeros((), dtype=torch.bool)
    optimizer.veto = lambda: veto
    for bad in (False, True, False):
        before = weight.detach().clone()
        veto.fill_(bad)
        weight.grad = torch.full_like(weight, float("nan") if bad else 0.5)
        optimizer.step()
        assert torch.equal(weight.detach(), before) == bad
    assert int(optimizer.state[weight]["step"]) == 2 and torch.isfinite(weight).all()
