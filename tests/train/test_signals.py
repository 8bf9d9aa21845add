"""Signals in the middle of things: an evaluation, a save, a compilation. Saved, code 75, and nothing is lost."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conf.constants import EXIT_REQUEUE
from conf.paths import RunPaths
from launch.packages import ROOT
from tests.gloo import GlooPool, WorkerError
from tests.train import fault_jobs, jobs
from tests.train.test_run import rows_of

PLACES = [("evaluate", signal.SIGTERM), ("evaluate", signal.SIGINT), ("save", signal.SIGUSR1),
          ("save in the foreground", signal.SIGTERM), ("start", signal.SIGUSR1)]  # fmt: skip


@pytest.fixture(scope="module")
def alone(pool2: GlooPool, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    assert pool2(fault_jobs.stage_on, jobs.chain_config(str(out), str(prepared)), "short") == [0, 0]
    return out


@pytest.mark.parametrize(("where", "number"), PLACES)
def test_saved_and_gone_on_with(
    pool2: GlooPool, prepared: Path, tmp_path: Path, alone: Path, where: str, number: int
) -> None:
    """One rank alone gets the signal, at step 2 or 4; both stop at the same step, with a checkpoint of it."""
    config = jobs.chain_config(str(tmp_path), str(prepared))
    config.checkpoint.background = where != "save in the foreground"
    assert pool2(fault_jobs.signalled, config, where, number) == [EXIT_REQUEUE] * 2
    stopped = len(rows_of(tmp_path, "train"))
    # The word travels with a step's sums, which are read one step late.
    first = {"evaluate": 4, "start": 1}.get(where, 2)
    assert first <= stopped <= first + 2 and stopped < 6
    assert pool2(jobs.newest, str(RunPaths(tmp_path).checkpoints)) == [(f"step-{stopped:08d}", "")] * 2
    assert pool2(fault_jobs.stage_on, config, "short") == [0, 0]
    for kind in ("train", "eval"):
        assert rows_of(tmp_path, kind) == rows_of(alone, kind)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_while_compiling(pool1: GlooPool, prepared: Path, tmp_path: Path) -> None:
    """SIGTERM a moment after the first step has begun: that ends, step 2 tells all ranks, step 3 is the last."""
    config = jobs.chain_config(str(tmp_path / "run"), str(prepared))
    config.engine.fused, config.eval.tokens, config.checkpoint.every = "compile", 0, 0
    code, compiling, newest = pool1(fault_jobs.stopped_while_compiling, config, str(tmp_path / "cache"))[0]
    assert (code, newest) == (EXIT_REQUEUE, "step-00000003")
    assert compiling, "nothing was being compiled when the signal came"


@pytest.mark.parametrize("where", ["evaluate", "save"])
def test_a_second_interrupt_does_not_wait(prepared: Path, tmp_path: Path, where: str) -> None:
    """A process that is busy for minutes leaves with code 130; what was saved before stays good."""
    pool = GlooPool(1)
    config = jobs.chain_config(str(tmp_path), str(prepared))
    with pytest.raises(WorkerError, match="exit code 130"):
        pool(fault_jobs.interrupted_twice, config, where, timeout=100.0)
    found = pool(jobs.newest, str(RunPaths(tmp_path).checkpoints))
    pool.close()
    assert found == [("step-00000002" if where == "evaluate" else "None", "")]


def test_a_second_interrupt_ends_a_process_that_is_stuck_outside_python() -> None:
    """As in a collective whose other rank is gone: the main thread never comes back to run a handler."""
    program = (
        "import ctypes, os, signal, threading, time\n"
        "from train.signals import StopSignal; StopSignal().install()\n"
        "def twice():\n"
        "    for pause in (0.3, 1.2):\n"
        "        time.sleep(pause); os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=twice).start()\n"
        "libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30).returncode == 130
