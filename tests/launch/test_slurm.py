"""A run under a real SLURM on this machine: submitted, preempted, requeued, resumed, told to stop, finished."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.paths import RunPaths
from launch.packages import ROOT
from tests.launch import slurm_cluster
from tests.launch.folders import save_texts
from tests.launch.slurm_cluster import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "there is a SLURM"),
]
STEPS = {"short": 120, "long": 80, "full": 4}  # enough of them that a signal comes in time
SAVES = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: sockets lie in it
    with slurm_cluster.cluster(folder / "c") as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_jobs_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.clear()


def submit(cluster: Cluster, folder: Path, out: str, *more: str) -> list[str]:
    """`moba train launch=slurm` in `folder`, with paths relative to it; the ids of the jobs."""
    settings = [f"stages.{name}.tokens={n * 4 * (64 if name == 'short' else 128)}" for name, n in STEPS.items()]
    # fmt: off
    command = [
        sys.executable, "-m", "launch.cli", "train", "recipe=smoke", f"out={out}", "launch=slurm", "eval.every=0",
        "data.sets.text.source=texts", "data.sets.text.path=set", f"checkpoint.every={SAVES}", "launch.threads=1",
        "launch.slurm.gpus=false", "launch.slurm.extra=[--exclusive]", *settings,
    ]
    # fmt: on
    env = cluster.env | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *more], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.split()[-2].rstrip(":") for line in done.stdout.splitlines() if line.startswith("submitted")]


def newest(run: RunPaths) -> int:
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)


def train_rows(run: RunPaths) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, run.metrics.read_text().splitlines()) if row["kind"] == "train"]


def test_preempted_told_to_stop_and_finished(cluster: Cluster, tmp_path: Path) -> None:
    save_texts(tmp_path / "texts")
    short, long, full = submit(cluster, tmp_path, "run")
    run = RunPaths(tmp_path / "run")
    output = lambda job: (run.root / "slurm" / f"{job}.out").read_text()  # noqa: E731
    # Later stages wait, each for the one before; the code that runs is the copy made at submission.
    assert cluster.state(long)["Dependency"].startswith(f"afterok:{short}")
    assert cluster.state(full)["Dependency"].startswith(f"afterok:{long}")
    (code,) = (run.root / "slurm").glob("code-*")
    with (code / "launch" / "node.py").open("a") as file:
        file.write("\nassert True\n")
    (code / "launch" / "__init__.py").write_text("print('from the copy', flush=True)\n")

    cluster.wait_for("a checkpoint", lambda: newest(run) >= SAVES)
    urgent = cluster.ask("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null",
                         "--wrap=sleep 1")  # fmt: skip
    cluster.wait_for("the preempting job", lambda: cluster.state(urgent)["JobState"] == "COMPLETED")
    stopped = newest(run)
    assert "stopped by a signal, saved" in output(short) and 0 < stopped < STEPS["short"]
    cluster.wait_for("the first stage, again", lambda: newest(run) > stopped)
    assert cluster.state(short)["Restarts"] == "1"

    cluster.wait_for("the second stage", lambda: newest(run) >= STEPS["short"] + SAVES)
    cluster.ask("scancel", "--signal=USR1", long)
    cluster.wait_for("the last stage", lambda: cluster.state(full)["JobState"] not in ("PENDING", "RUNNING"), 180)
    states = [cluster.state(job) for job in (short, long, full)]
    said = [output(job) for job in (short, long, full)]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 3, said
    assert [state["Restarts"] for state in states] == ["1", "1", "0"], said
    assert all("from the copy" in text for text in said)
    rows = train_rows(run)
    assert [row["step"] for row in rows] == list(range(1, sum(STEPS.values()) + 1))
    assert [row["stage"] for row in rows] == [name for name, n in STEPS.items() for _ in range(n)]


def test_bad_settings_end_the_job_and_those_behind_it(cluster: Cluster, tmp_path: Path) -> None:
    """Code 2 is no matter of trying again: the job fails, and SLURM drops the stages that wait for it."""
    save_texts(tmp_path / "texts")
    short, long, _ = submit(cluster, tmp_path, "run", "launch.max_restarts=3", "launch.slurm.submit=true")
    (settings,) = (tmp_path / "run" / "slurm").glob("config-*.yaml")
    settings.write_text("seed: [1\n")
    cluster.wait_for("the failure", lambda: cluster.state(short)["JobState"] == "FAILED")
    assert cluster.state(short)["ExitCode"] == "2:0"
    cluster.wait_for("the end of the chain", lambda: cluster.state(long)["JobState"] == "CANCELLED")
    said = (tmp_path / "run" / "slurm" / f"{short}.out").read_text()
    assert said.startswith("error: ") and "Traceback" not in said
