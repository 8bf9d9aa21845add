"""A rank that stands still: all processes end within the stated time, and the right one is named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from conf.paths import RunPaths
from tests.gloo import GlooPool, WorkerError
from tests.train import fault_jobs, jobs
from train.watchdog import Beat, Watchdog, culprit, read_beats


def beat(rank: int, step: int, place: str, since: float, written: float = 100.0) -> Beat:
    return Beat(rank, "host", 1, step, place, since, written, "data/loader.py:1 (step)")


def test_the_rank_least_far_along_is_named() -> None:
    waiting = [beat(0, 17, "step", 50.0), beat(2, 17, "step", 49.0), beat(3, 18, "data", 51.0)]
    assert culprit([*waiting, beat(1, 17, "data", 52.0)], alive_after=90.0).rank == 1
    assert culprit([*waiting, beat(1, 16, "save", 52.0)], alive_after=90.0).rank == 1


def test_a_silent_process_is_named_before_all() -> None:
    beats = [beat(0, 3, "data", 10.0), beat(1, 9, "step", 60.0, written=70.0)]
    assert culprit(beats, alive_after=90.0).rank == 1
    assert "rank 1 (host host, process 1) has stood at step 9, step, since" in beats[1].text()


def test_heartbeat_tells_where_the_main_thread_is(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 3, timeout=0.6).start()
    for step in range(12):  # longer than the timeout in all, but always moving
        watchdog.at("data", step)
        time.sleep(0.1)
    watchdog.end()
    (found,) = read_beats(tmp_path)
    assert (found.rank, found.place) == (3, "data") and found.step > 5
    assert "test_watchdog.py" in found.line
    (tmp_path / "rank-00007.json").write_text("{torn")
    assert [one.rank for one in read_beats(tmp_path)] == [3]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data", "frozen"])
def test_a_stall_ends_the_job(prepared: Path, tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    pool = GlooPool(2)
    config = jobs.chain_config(str(tmp_path), str(prepared))
    config.eval.tokens, config.launch.timeout = 0, 5.0
    with pytest.raises(WorkerError, match="exit code 76"):
        pool(fault_jobs.stalled, config, how, timeout=90.0)
    pool.kill()
    said = capfd.readouterr().err
    assert "error: no progress for 5 s (launch.timeout): rank 1" in said, said
    stood = json.loads((RunPaths(tmp_path).heartbeat / "rank-00001.json").read_text())
    assert stood["step"] <= 3
