from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import UserError
from conf.paths import RunPaths
from conf.schema import StageConfig, TrainConfig
from launch import stages
from launch.stages import Progress, next_stage, read_progress, walk


def chain(max_steps: int | None = None) -> TrainConfig:
    return TrainConfig(out="x", max_steps=max_steps, stages={name: StageConfig(64, 256, 4) for name in "abc"})


@pytest.mark.parametrize(
    ("progress", "max_steps", "wanted"),
    [
        (Progress(), None, "a"),
        (Progress(3, "a", False), None, "a"),
        (Progress(4, "a", True), None, "b"),
        (Progress(9, "b", True), None, "c"),
        (Progress(12, "c", False), None, "c"),
        (Progress(14, "c", True), None, None),
        (Progress(4, "a", True), 5, "b"),
        (Progress(5, "b", False), 5, None),
        (Progress(4, "a", True), 4, None),
    ],
)
def test_next_stage(progress: Progress, max_steps: int | None, wanted: str | None) -> None:
    assert next_stage(chain(max_steps), progress) == wanted


def test_checkpoint_of_a_stage_that_is_not_in_the_chain() -> None:
    with pytest.raises(UserError, match="stage z, and stages has only a, b, c"):
        next_stage(chain(), Progress(3, "z", True))


def test_walk_runs_what_is_left_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = [Progress(3, "a", False)]
    started: list[str] = []

    def start(stage: str) -> int:
        started.append(stage)
        saved.append(Progress(saved[-1].step + 4, stage, True))
        return 0

    monkeypatch.setattr(stages, "read_progress", lambda run: saved[-1])
    assert walk(chain(), RunPaths(tmp_path), start) == 0
    assert started == ["a", "b", "c"]
    assert walk(chain(), RunPaths(tmp_path), start) == 0
    assert started == ["a", "b", "c"]  # nothing left


def test_walk_stops_at_a_failure_and_passes_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(stages, "read_progress", lambda run: Progress(len(started), "abc"[len(started)], False))

    def start(stage: str) -> int:
        started.append(stage)
        return 2 if stage == "b" else 0

    assert walk(chain(), RunPaths(tmp_path), start) == 2
    assert started == ["a", "b"]


def test_walk_does_not_turn_in_circles(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="saved nothing new"):
        walk(chain(), RunPaths(tmp_path), lambda stage: 0)


def test_a_run_without_checkpoints_is_at_the_start(tmp_path: Path) -> None:
    assert read_progress(RunPaths(tmp_path)) == Progress()
    (tmp_path / "checkpoints").mkdir()
    assert read_progress(RunPaths(tmp_path)) == Progress()
