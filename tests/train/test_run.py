"""Whole stages through `run_stage`: hand-over, resume, signals, metrics; and real kills of a real worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from conf.constants import EXIT_REQUEUE, EXIT_USER_ERROR
from conf.errors import UserError
from conf.load import save_config
from conf.paths import RunPaths, checkpoint_name
from conf.schema import TrainConfig
from tests.gloo import GlooPool
from tests.train import jobs
from train.run import starting_state, tokens_of_steps
from train.state import TrainState

TIMES = ("tokens_per_s",)


def rows_of(out: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in RunPaths(out).metrics.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows if row["kind"] == kind]


def weights_of(out: Path, step: int) -> dict[str, np.ndarray]:
    folder = RunPaths(out).checkpoints / checkpoint_name(step)
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(pool2: GlooPool, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain, uninterrupted, on two processes."""
    out = tmp_path_factory.mktemp("whole")
    config = jobs.chain_config(str(out), str(prepared))
    assert pool2(jobs.stage, config, "short") == [0, 0]
    assert pool2(jobs.stage, config, "long") == [0, 0]
    return out


def test_the_chain(whole: Path) -> None:
    train, evaluations = rows_of(whole, "train"), rows_of(whole, "eval")
    assert [row["step"] for row in train] == list(range(1, 13))
    assert [row["stage"] for row in train] == ["short"] * 6 + ["long"] * 6
    assert [row["tokens"] for row in train] == [128 * i for i in range(1, 7)] + [
        768 + 256 * i for i in range(1, 7)
    ]
    assert [row["plan"] for row in train] == ["full"] * 6 + ["moba 16x2"] * 3 + ["full"] * 3
    assert [row["seq_len"] for row in train] == [32] * 6 + [64] * 6
    assert all(row["lr"] > 0 and np.isfinite(row["grad_norm"]) for row in train)
    # At the run's start, every fourth step, and at the ends of stages.
    assert [row["step"] for row in evaluations] == [0, 4, 6, 8, 12]
    assert all(row["heldout_tokens"] > 400 for row in evaluations)
    assert evaluations[-1]["heldout_loss"] < evaluations[0]["heldout_loss"]
    kept = sorted(path.name for path in RunPaths(whole).checkpoints.iterdir())
    assert kept == [checkpoint_name(step) for step in (6, 10, 12)]
    state = json.loads((RunPaths(whole).checkpoints / kept[-1] / "state.json").read_text())
    assert (state["stage"], state["stage_done"], state["optimizer_step"]) == ("long", True, 12)


def test_nothing_is_left_to_do(pool2: GlooPool, whole: Path, prepared: Path) -> None:
    before = RunPaths(whole).metrics.read_text()
    config = jobs.chain_config(str(whole), str(prepared))
    assert pool2(jobs.stage, config, "short") == [0, 0]
    assert pool2(jobs.stage, config, "long") == [0, 0]
    assert RunPaths(whole).metrics.read_text() == before


def test_stopping_anywhere_changes_no_number(pool2: GlooPool, whole: Path, prepared: Path, tmp_path: Path) -> None:
    """max_steps inside both stages, and SIGTERM to one rank alone: the same rows and weights, bit for bit."""

    def go(name: str, max_steps: int | None, signal_at: int = -1) -> list[int]:
        config = jobs.chain_config(str(tmp_path), str(prepared), max_steps=max_steps)
        codes: list[int] = pool2(jobs.stage, config, name, signal_at)
        return codes

    assert go("short", 3) == [0, 0]
    assert rows_of(tmp_path, "train")[-1]["step"] == 3
    assert go("short", None) == [0, 0]
    assert go("long", 7) == [0, 0]
    assert go("long", None, signal_at=3) == [EXIT_REQUEUE] * 2
    stopped = rows_of(tmp_path, "train")[-1]["step"]
    assert 7 < stopped < 12
    assert (RunPaths(tmp_path).checkpoints / checkpoint_name(stopped)).is_dir()
    assert go("long", None) == [0, 0]
    assert rows_of(tmp_path, "train") == rows_of(whole, "train")
    assert rows_of(tmp_path, "eval") == rows_of(whole, "eval")
    want, got = weights_of(whole, 12), weights_of(tmp_path, 12)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_one_process_trains_the_same(pool1: GlooPool, whole: Path, prepared: Path, tmp_path: Path) -> None:
    config = jobs.chain_config(str(tmp_path), str(prepared), zero_stage=3)
    for name in config.stages:
        assert pool1(jobs.stage, config, name) == [0]
    for key, kind in (("loss", "train"), ("grad_norm", "train"), ("heldout_loss", "eval")):
        got = [row[key] for row in rows_of(tmp_path, kind)]
        np.testing.assert_allclose(got, [row[key] for row in rows_of(whole, kind)], rtol=1e-5)


def test_a_stage_may_start_with_a_fresh_optimizer(
    pool2: GlooPool, whole: Path, prepared: Path, tmp_path: Path
) -> None:
    config = jobs.chain_config(str(tmp_path), str(prepared), carry=False)
    for name in config.stages:
        assert pool2(jobs.stage, config, name) == [0, 0]
    state = json.loads((RunPaths(tmp_path).checkpoints / checkpoint_name(12) / "state.json").read_text())
    assert state["optimizer_step"] == 6
    same = [
        a["loss"] == b["loss"] for a, b in zip(rows_of(tmp_path, "train"), rows_of(whole, "train"), strict=True)
    ]
    assert same == [True] * 7 + [False] * 5  # the carried weights decide step 7, the moments what follows


def test_starting_state() -> None:
    chain = ["a", "b", "c"]
    assert starting_state(None, chain, "a") == TrainState("a")
    running, done = TrainState("a", 5, 50, 5, 50), TrainState("a", 9, 90, 9, 90, stage_done=True)
    assert starting_state(running, chain, "a") is running
    assert starting_state(done, chain, "b") == TrainState("b", step=9, tokens=90)
    assert starting_state(TrainState("c", 3), chain, "a").stage_done
    for saved, name in ((None, "b"), (running, "b"), (done, "c"), (TrainState("gone"), "a")):
        with pytest.raises(UserError, match="stage"):
            starting_state(saved, chain, name)


def test_tokens_of_steps(prepared: Path) -> None:
    config = jobs.chain_config("out", str(prepared))
    assert [tokens_of_steps(config, n) for n in (0, 6, 7, 99)] == [0, 768, 1024, 768 + 6 * 256]


def start_worker(config: TrainConfig, stage: str) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "train.run", str(RunPaths(Path(config.out)).config), stage]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(out: Path, step: int, worker: subprocess.Popen[str]) -> None:
    path = RunPaths(out).checkpoints / checkpoint_name(step)
    deadline = time.monotonic() + 180
    while not path.is_dir():
        assert worker.poll() is None, worker.communicate()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


@pytest.mark.slow
def test_sigkill_of_a_worker_process(pool1: GlooPool, prepared: Path, tmp_path: Path) -> None:
    """A real worker, killed with SIGKILL, stopped with SIGTERM, run to its end: the rows of a run left alone."""
    alone, out = tmp_path / "alone", tmp_path / "killed"
    config = jobs.chain_config(str(alone), str(prepared))
    config.stages["short"].tokens = 40 * 128
    assert pool1(jobs.stage, config, "short") == [0]
    config.out = str(out)
    save_config(config, RunPaths(out).config)
    worker = start_worker(config, "short")
    wait_for_step(out, 8, worker)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    worker = start_worker(config, "short")
    wait_for_step(out, 20, worker)
    worker.send_signal(signal.SIGTERM)
    output = worker.communicate(timeout=120)
    assert worker.returncode in (EXIT_REQUEUE, 0), output
    if worker.returncode:
        worker = start_worker(config, "short")
        output = worker.communicate(timeout=180)
        assert worker.returncode == 0, output
    assert rows_of(out, "train") == rows_of(alone, "train")
    assert rows_of(out, "eval") == rows_of(alone, "eval")


def test_bad_input_is_one_line_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.run", str(tmp_path / "absent.yaml"), "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_second_interrupt_ends_at_once() -> None:
    program = (
        "import os, signal, time; from train.signals import StopSignal; s = StopSignal().install();"
        "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); print(s.requested, flush=True);"
        "time.sleep(1.1); os.kill(os.getpid(), signal.SIGINT); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.returncode) == ("True\n", 130)
