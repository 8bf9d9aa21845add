from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import UserError
from conf.load import save_config
from conf.paths import RunPaths
from conf.schema import TrainConfig
from launch import rundir
from launch.rundir import check_same, run_lock


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return compose("train", ["recipe=smoke", "out=runs/x"])


@pytest.fixture
def run(tmp_path: Path, config: TrainConfig) -> RunPaths:
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    return RunPaths(tmp_path)


def changed(config: TrainConfig, key: str, value: object) -> TrainConfig:
    result = copy.deepcopy(config)
    owner: object = result
    *path, last = key.split(".")
    for name in path:
        owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    if isinstance(owner, dict):
        owner[last] = value
    else:
        setattr(owner, last, value)
    return result


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 4),
        ("dry_run", True),
        ("out", "elsewhere"),
        ("launch.nproc", 2),
        ("mesh.sequence_parallel", 2),
        ("engine.zero_stage", 3),
        ("engine.deterministic", True),
        ("metrics.wandb.mode", "offline"),
        ("checkpoint.every", 7),
        ("eval.tokens", 999),
        ("stages.long.micro_batch", 2),
        ("stages.long.attention.backend", "reference"),
        ("data.sets.text.path", "moved"),
    ],
)
def test_what_may_change(key: str, value: object, config: TrainConfig, run: RunPaths) -> None:
    check_same(changed(config, key, value), run)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("seed", 1, ["seed=0", "seed=1"]),
        ("engine.precision", "bf16", ["engine.precision=fp32", "engine.precision=bf16"]),
        ("stages.long.lr.peak", 0.5, ["stages.long.lr.peak=0.005", "stages.long.lr.peak=0.5"]),
        ("stages.long.global_batch", 8, ["stages.long.global_batch=4", "=8"]),
        ("stages.short.attention.kind", "moba", ["stages.short.attention.kind=full", "=moba"]),
        ("stages.long.data.domains.web", 0.5, ["stages.long.data.domains.web=None", "=0.5"]),
        ("model.num_layers", 3, ["model.num_layers=2", "=3"]),
        ("optim.clip", 0.0, ["optim.clip=1.0", "=0.0"]),
        ("data.sets.text.heldout", 0.2, ["data.sets.text.heldout=0.05", "=0.2"]),
    ],
)
def test_what_may_not(key: str, value: object, wanted: list[str], config: TrainConfig, run: RunPaths) -> None:
    with pytest.raises(UserError) as caught:
        check_same(changed(config, key, value), run)
    for text in (*wanted, str(run.root), "another out=", "restore the value"):
        assert text in str(caught.value)


def test_the_order_of_stages_counts(config: TrainConfig, run: RunPaths) -> None:
    other = copy.deepcopy(config)
    other.stages = dict(reversed(other.stages.items()))
    with pytest.raises(
        UserError, match=r"stages=\['short', 'long', 'full'\], now stages=\['full', 'long', 'short'\]"
    ):
        check_same(other, run)


def test_nothing_trained_nothing_to_differ_from(config: TrainConfig, tmp_path: Path) -> None:
    check_same(config, RunPaths(tmp_path))
    save_config(config, tmp_path / "config.yaml")
    check_same(changed(config, "seed", 5), RunPaths(tmp_path))


def test_one_user_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "LOCK_SECONDS", 0.3)
    run = RunPaths(tmp_path / "run")
    with run_lock(run), pytest.raises(UserError, match="in use by another"), run_lock(run):
        pass
    with run_lock(run):  # free again
        pass


def test_a_child_holds_the_lock_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher is gone, its workers are not: the folder stays taken until they are."""
    monkeypatch.setattr(rundir, "LOCK_SECONDS", 0.3)
    run = RunPaths(tmp_path)
    with run_lock(run) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(UserError, match="in use"), run_lock(run):
        pass
    child.communicate(b"\n", timeout=30)
    with run_lock(run):
        pass
