"""`launch.max_restarts` with real faults: ranks that crash, are killed or freeze, and the run ends well."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.paths import RunPaths
from launch.packages import ROOT
from tests.launch.folders import save_texts

ENDING = 20  # seconds beyond one and a half timeouts: torchrun would give a frozen process 30, on top of polling

# Imported by every interpreter that finds it. In the worker of rank 1 it waits for a checkpoint and strikes once.
STRIKE = """
import os, pathlib, threading, time
folder, out, strikes = pathlib.Path({folder!r}), pathlib.Path({out!r}), {strikes!r}
def strike():
    while True:
        saved = max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)
        for name, step, number in strikes:
            mark = folder / name
            if saved >= step and not mark.exists():
                mark.write_text(str(time.time()))
                os.kill(os.getpid(), number)
        time.sleep(0.02)
if os.environ.get("RANK") == "1":
    threading.Thread(target=strike, daemon=True).start()
"""
CRASH, FREEZE = ("crash", 4, int(signal.SIGSEGV)), ("freeze", 20, int(signal.SIGSTOP))
KILL = ("kill", 4, int(signal.SIGKILL))


def start(
    folder: Path, name: str, strikes: list[tuple[str, int, int]], timeout: int, steps: int, *more: str
) -> subprocess.Popen[bytes]:
    """`moba train` of two ranks into `folder / name`, its output in NAME.log, with these strikes of rank 1."""
    out, site = folder / name, folder / f"{name}-site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(STRIKE.format(folder=str(folder), out=str(out), strikes=strikes))
    # fmt: off
    command = [
        sys.executable, "-m", "launch.cli", "train", "recipe=smoke", f"out={out}", "launch.nproc=2",
        f"data.sets.text.source={folder / 'texts'}", f"launch.timeout={timeout}", "launch.max_restarts=2",
        "checkpoint.every=2", "eval.every=0", "stages.short.tokens=102400", f"max_steps={steps}",
        "launch.threads=1", *more,
    ]
    # fmt: on
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    with (folder / f"{name}.log").open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=file, stderr=file)


def rows(out: Path) -> list[dict[str, Any]]:
    """Of the training steps, without what depends on the clock."""
    read = map(json.loads, RunPaths(out).metrics.read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read if row["kind"] == "train"]


def told(log: Path, text: str, process: subprocess.Popen[bytes]) -> float:
    """When `text` came up in the log."""
    deadline = time.time() + 150
    while text not in log.read_text():
        assert process.poll() is None and time.time() < deadline, log.read_text()
        time.sleep(0.1)
    return time.time()


@pytest.mark.slow
def test_a_crash_and_a_freeze_are_survived(tmp_path: Path) -> None:
    save_texts(tmp_path / "texts")
    log, timeout, steps = tmp_path / "run.log", 6, 100
    process = start(tmp_path, "run", [CRASH, FREEZE], timeout, steps)
    try:
        heard = [told(log, f"restart {number} of 2 (launch.max_restarts)", process) for number in (1, 2)]
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
    said = log.read_text()
    assert re.search(r"error: worker rank 1 was killed by signal 11; its output is in \S*stderr.log\n", said), said
    assert f"error: no progress for {timeout} s (launch.timeout): rank 1 (host " in said
    assert "restart 3" not in said
    struck = [float((tmp_path / name).read_text()) for name in ("crash", "freeze")]
    assert heard[0] - struck[0] < ENDING and heard[1] - struck[1] < 1.5 * timeout + ENDING, (heard, struck)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, steps + 1))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("strike", [KILL, FREEZE], ids=["kill", "freeze"])
def test_on_gpus_the_undisturbed_rows_come_out(tmp_path: Path, strike: tuple[str, int, int]) -> None:
    """The other rank waits in a collective of NCCL, which no signal of ours reaches."""
    save_texts(tmp_path / "texts")
    name, _, number = strike
    frozen = number == signal.SIGSTOP
    log, steps = tmp_path / "run.log", 40
    timeout = 20 if frozen else 90  # a first step compiles
    prepared = [f"data.sets.text.path={tmp_path / 'data'}", "engine.deterministic=true", "metrics.batch_hash=true"]
    process = start(tmp_path, "run", [strike], timeout, steps, *prepared)
    told(log, "[short]", process)  # the data are there
    alone = start(tmp_path, "alone", [], 0, steps, *prepared)
    try:
        heard = told(log, "restart 1 of 2 (launch.max_restarts)", process)
        codes = process.wait(120), alone.wait(120)
        assert codes == (0, 0), log.read_text() + (tmp_path / "alone.log").read_text()
    finally:
        process.kill()
        alone.kill()
    said = log.read_text()
    wanted = f"no progress for {timeout} s (launch.timeout): rank 1 (host " if frozen else "was killed by signal 9"
    assert wanted in said and "restart 2" not in said, said
    assert heard - float((tmp_path / name).read_text()) < ENDING + 1.5 * timeout * frozen
    assert rows(tmp_path / "run") == rows(tmp_path / "alone")
