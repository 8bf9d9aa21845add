"""A change within a run: refused, unless `resume.allow` names it; then recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.load import load_train_config, save_config
from conf.paths import RunPaths
from launch import train
from launch.cli import main
from launch.rundir import check_same, check_timely
from launch.stages import Progress
from tests.launch.test_rundir import changed

ATTENTION = "stages.long.attention"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run in the middle of its second stage, whose workers and data are left out."""
    config = train.resolve(["recipe=smoke", f"out={tmp_path}"])
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    monkeypatch.setattr(train, "read_progress", lambda run: Progress(5, "long", False))
    monkeypatch.setattr(train, "prepare_data", lambda config, fresh: None)
    monkeypatch.setattr(train, "starter", lambda launch: lambda config, paths, lock: 0)
    return RunPaths(tmp_path)


def go(run: RunPaths, *overrides: str) -> int:
    return main(["train", f"out={run.root}", *overrides])


def test_a_change_of_plan_is_refused_with_the_way_to_do_it(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(run, f"{ATTENTION}.topk=1") == 2
    error = capsys.readouterr().err
    assert f"{ATTENTION}.topk=2, now {ATTENTION}.topk=1" in error
    assert f"resume.allow=[{ATTENTION}]" in error
    assert go(run, "seed=3") == 2
    assert "resume.allow" not in capsys.readouterr().err


def test_an_allowed_change_is_recorded_and_not_allowed_forever(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(run, f"{ATTENTION}.topk=1", f"{ATTENTION}.full_after=0.5", f"resume.allow=[{ATTENTION}]") == 0
    assert f"step 5: {ATTENTION}.topk=2 -> 1 (resume.allow)" in capsys.readouterr().out
    rows = [json.loads(line) for line in run.changes.read_text().splitlines()]
    assert rows == [
        {"step": 5, "stage": "long", "key": f"{ATTENTION}.topk", "before": 2, "now": 1},
        {"step": 5, "stage": "long", "key": f"{ATTENTION}.full_after", "before": 1.0, "now": 0.5},
    ]
    saved = load_train_config(run.config)
    assert saved.stages["long"].attention.topk == 1 and saved.resume.allow == []
    head = run.config.read_text().splitlines()[:3]
    assert head == [
        "# attention of short: full",
        "# attention of long: 0 moba 16x1, 1 full; from 50%: full",
        "# attention of full: full",
    ]
    assert go(run, f"{ATTENTION}.topk=2") == 2  # back again is a change as well
    assert go(run) == 0 and len(run.changes.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("allow", "wanted"),
    [
        ("model.num_layers", "only stages.NAME.attention"),
        ("stages.long", "only stages.NAME.attention"),
        ("stages.long.seq_len", "only stages.NAME.attention"),
        ("stages.lang.attention", "stages has only short, long, full"),
    ],
)
def test_what_cannot_be_allowed(allow: str, wanted: str, run: RunPaths) -> None:
    config = load_train_config(run.config)
    config.resume.allow = [allow]
    with pytest.raises(UserError, match=wanted):
        check_same(config, run)


def test_only_what_is_named_is_allowed(run: RunPaths) -> None:
    config = changed(load_train_config(run.config), "stages.long.lr.peak", 0.5)
    config.resume.allow = [f"{ATTENTION}.topk"]
    with pytest.raises(UserError, match=r"stages\.long\.lr\.peak"):
        check_same(config, run)
    config.resume.allow = ["stages.long.lr"]
    assert [change.key for change in check_same(config, run)] == ["stages.long.lr.peak"]


def test_a_finished_stage_cannot_change(run: RunPaths) -> None:
    config = changed(load_train_config(run.config), "stages.short.attention.kind", "moba")
    config.resume.allow = ["stages.short.attention"]
    changes = check_same(config, run)
    check_timely(changes, config, Progress(2, "short", False))
    for progress in (Progress(4, "short", True), Progress(5, "long", False)):
        with pytest.raises(UserError, match="stage short is over"):
            check_timely(changes, config, progress)
