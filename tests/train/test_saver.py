"""Saving in the background: kills at random moments, full disks, and what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.load import save_config
from conf.paths import RunPaths
from launch.packages import ROOT
from tests.gloo import GlooPool
from tests.train import fault_jobs, jobs
from tests.train.test_run import rows_of
from train.files import SaveError
from train.metrics import JsonlSink

KILLS = int(os.environ.get("LONGMOBA_KILLS", "50"))  # `make soak` asks for more
STEPS = 5 * KILLS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_lose_nothing(pool1: GlooPool, prepared: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, mostly during a save: the rows of a run left alone, bit for bit."""
    config = jobs.chain_config(str(tmp_path / "killed"), str(prepared))
    config.stages["short"].tokens = STEPS * 128
    config.eval.tokens, config.checkpoint.every = 0, 1
    settings = tmp_path / "config.yaml"
    save_config(config, settings)
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kills", str(settings), "short", str(KILLS), "11"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, text=True,
        capture_output=True, timeout=120 + 15 * KILLS,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.get("kills") == KILLS and result["status"] == 0, (result, done.stderr[-2000:])
    assert result["newest"] == sorted(result["newest"]) and result["newest"][-1] > 0
    assert result["torn"]  # some of them hit a save
    assert "damaged" not in done.stderr
    killed = rows_of(tmp_path / "killed", "train")
    assert [row["step"] for row in killed] == list(range(1, STEPS + 1))
    config.out, config.checkpoint.every = str(tmp_path / "alone"), 0
    assert pool1(jobs.stage, config, "short") == [0]
    assert killed == rows_of(tmp_path / "alone", "train")
    assert not list(RunPaths(tmp_path / "killed").checkpoints.glob(".tmp-*"))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_stops_all_ranks_with_one_line(
    pool2: GlooPool, prepared: Path, tmp_path: Path, full: int, background: bool
) -> None:
    """Files on one rank's disk cannot grow: all stop alike, and the checkpoint before is what a resume finds."""
    config = jobs.chain_config(str(tmp_path), str(prepared), zero_stage=1, max_steps=2)
    config.checkpoint.background = background
    assert pool2(fault_jobs.stage_on, config, "short") == [0, 0]
    config.max_steps = None
    said = pool2(fault_jobs.stage_with_little_disk, config, full, 5000)
    assert said[0] == said[1] and "\n" not in said[0]
    assert f"checkpoint not written: rank {full}: File too large" in said[0]
    assert [path.name for path in RunPaths(tmp_path).checkpoints.glob("step-*")] == ["step-00000002"]
    assert pool2(fault_jobs.stage_on, config, "short") == [0, 0]
    assert [row["step"] for row in rows_of(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB: a few checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {' '.join(done.stderr.split())}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", [True, False])
def test_a_small_disk_runs_full(
    pool2: GlooPool, prepared: Path, tmp_path: Path, small_disk: Path, background: bool
) -> None:
    """Everything of the run lies on it. One line, the newest checkpoint stays good, and with room it goes on."""
    config = jobs.chain_config(str(small_disk / "run"), str(prepared), zero_stage=2)
    config.checkpoint.every, config.checkpoint.keep, config.checkpoint.background = 1, 99, background
    config.stages["short"].tokens, config.eval.tokens = 12 * 128, 0
    (small_disk / "filler").write_bytes(bytes(150_000))
    said = pool2(fault_jobs.stage_until_the_disk_is_full, config)
    assert said[0] == said[1] and "\n" not in said[0]
    assert "checkpoint not written: rank " in said[0] and "No space left on device" in said[0]
    checkpoints = RunPaths(small_disk / "run").checkpoints
    kept = sorted(path.name for path in checkpoints.glob("step-*"))
    assert kept and pool2(jobs.newest, str(checkpoints)) == [(kept[-1], "")] * 2
    (small_disk / "filler").unlink()
    config.checkpoint.keep = 1
    assert pool2(fault_jobs.stage_on, config, "short") == [0, 0]
    assert [row["step"] for row in rows_of(small_disk / "run", "train")] == list(range(1, 13))


def test_metrics_on_a_full_disk_are_one_line(small_disk: Path) -> None:
    log = JsonlSink(small_disk / "metrics.jsonl", -1)
    with pytest.raises(SaveError, match=r"metrics.jsonl not written: No space left on device") as caught:
        for step in range(100_000):
            log.write({"kind": "train", "step": step})
    log.close()
    assert "\n" not in str(caught.value)
