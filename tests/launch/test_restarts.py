"""`launch.max_restarts` with real faults: a rank that crashes, then one that freezes, and the run ends well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.paths import RunPaths
from launch.packages import ROOT
from tests.launch.folders import save_texts

TIMEOUT = 6  # launch.timeout, seconds
ENDING = 40  # seconds beyond one and a half timeouts: torchrun gives a frozen process 30, polling takes some
STEPS = 100

# Imported by every interpreter that finds it. In the worker of rank 1 it waits for a checkpoint and strikes once.
STRIKE = """
import ctypes, os, pathlib, signal, threading, time
folder, out = pathlib.Path({folder!r}), pathlib.Path({out!r})
def strike():
    while True:
        saved = max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)
        for name, step in (("crash", 4), ("freeze", 20)):
            mark = folder / name
            if saved >= step and not mark.exists():
                mark.write_text(str(time.time()))
                if name == "crash":
                    ctypes.string_at(0)
                os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.02)
if os.environ.get("RANK") == "1":
    threading.Thread(target=strike, daemon=True).start()
"""


@pytest.mark.slow
def test_a_crash_and_a_freeze_are_survived(tmp_path: Path) -> None:
    save_texts(tmp_path / "texts")
    run, log = RunPaths(tmp_path / "run"), tmp_path / "log"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STRIKE.format(folder=str(tmp_path), out=str(run.root)))
    # fmt: off
    command = [
        sys.executable, "-m", "launch.cli", "train", "recipe=smoke", f"out={run.root}", "launch.nproc=2",
        f"data.sets.text.source={tmp_path / 'texts'}", f"launch.timeout={TIMEOUT}", "launch.max_restarts=2",
        "checkpoint.every=2", "eval.every=0", "stages.short.tokens=102400", f"max_steps={STEPS}",
        "launch.threads=1",
    ]
    # fmt: on
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH"))))
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=file, stderr=file
        )
    try:
        heard = [told(log, f"restart {number} of 2 (launch.max_restarts)", process) for number in (1, 2)]
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
    said = log.read_text()
    assert re.search(r"error: worker rank 1 was killed by signal 11; its output is in \S*stderr.log\n", said), said
    assert f"error: no progress for {TIMEOUT} s (launch.timeout): rank 1 (host " in said
    assert "restart 3" not in said
    struck = [float((tmp_path / name).read_text()) for name in ("crash", "freeze")]
    assert heard[0] - struck[0] < ENDING and heard[1] - struck[1] < 1.5 * TIMEOUT + ENDING, (heard, struck)
    rows = [row for row in map(json.loads, run.metrics.read_text().splitlines()) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def told(log: Path, text: str, process: subprocess.Popen[bytes]) -> float:
    """When `text` came up in the log."""
    deadline = time.time() + 150
    while text not in log.read_text():
        assert process.poll() is None and time.time() < deadline, log.read_text()
        time.sleep(0.1)
    return time.time()
