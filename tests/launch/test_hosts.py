"""`launch=hostfile` on two hosts: they meet, train together, and one is cut off in the middle of the run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.constants import EXIT_STALLED
from conf.paths import RunPaths
from launch.packages import ROOT
from tests.launch import namespaces
from tests.launch.folders import save_texts
from tests.launch.namespaces import Hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing() or "there are namespaces"),
]
TIMEOUT = 15  # launch.timeout, seconds: building the engine on busy cores takes most of it
ENDING = 40  # seconds beyond one and a half timeouts: torchrun gives a frozen process 30, polling takes some


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    (tmp_path / "bin").mkdir()
    with namespaces.two_hosts(tmp_path / "bin") as two:
        yield two


def start(hosts: Hosts, folder: Path, *more: str) -> subprocess.Popen[str]:
    """A run on both hosts, its paths relative to `folder`."""
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    # fmt: off
    command = [
        sys.executable, "-m", "launch.cli", "train", "recipe=smoke", "out=run", "launch=hostfile",
        "launch.hostfile=hosts", "launch.nodes=2", f"launch.timeout={TIMEOUT}", "launch.threads=1",
        "data.sets.text.source=texts", "data.sets.text.path=set", "checkpoint.every=2", "engine.zero_stage=2",
        "stages.short.tokens=102400", *more,
    ]
    # fmt: on
    env = hosts.env | {"PYTHONPATH": str(ROOT)}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, text=True)


def wait_for(met: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not met():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def newest(run: RunPaths) -> int:
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)


def cut_and_mend(hosts: Hosts, run: RunPaths, process: subprocess.Popen[str], log: Path) -> tuple[float, int]:
    """Seconds from the cut to the restart, and the step of the newest checkpoint then."""
    wait_for(lambda: newest(run) >= 4, process, log)
    hosts.cut(1)
    since = time.monotonic()
    again = f"error: stage short ended with code {EXIT_STALLED}: restart 1 of 1 (launch.max_restarts)"
    wait_for(lambda: again in log.read_text(), process, log)
    seconds = time.monotonic() - since
    hosts.mend(1)
    return seconds, newest(run)


def test_one_of_two_hosts_is_cut_off(hosts: Hosts, tmp_path: Path) -> None:
    """Nothing says so to the other but silence: both leave within the stated time, and start again."""
    save_texts(tmp_path / "texts")
    run, log = RunPaths(tmp_path / "run"), tmp_path / "log"
    process = start(hosts, tmp_path, "launch.max_restarts=1", "max_steps=60")
    try:
        seconds, stopped_at = cut_and_mend(hosts, run, process, log)
        code = process.wait(150)
    finally:
        process.kill()
    said = log.read_text()
    assert code == 0 and stopped_at < 60, said
    assert seconds < TIMEOUT * 1.5 + ENDING, f"{seconds:.0f} s\n{said}"
    assert f"error: no progress for {TIMEOUT} s (launch.timeout): rank " in said
    assert "Traceback" not in said
    rows = [row for row in map(json.loads, run.metrics.read_text().splitlines()) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 61))
