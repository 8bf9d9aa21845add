from __future__ import annotations

from typing import Any

from launch.study.plan import Group
from launch.study.stats import Arms
from launch.study.task_page import task_parts, time_parts

GROUP = Group(baseline="attention=full", axes={"attention": {"full": [], "moba": []}})


def arm(times: tuple[float, float], scores: list[float], workers: int = 1) -> dict[str, Any]:
    """An arm of two stages of 2M and 4M tokens, with needles at two depths and one RULER task."""
    stages = {"mid": {"seq_len": 1024, "tokens": 2_000_000}, "long": {"seq_len": 4096, "tokens": 6_000_000}}
    steady = dict(zip(stages, times, strict=True))
    needles = {"suite": "needle", "lengths": [1024], "depths": [0, 100], "grids": {"moba": [[s] for s in scores]}}
    ruler = {"suite": "ruler", "plans": {"moba": {"lengths": {"2048": {"scores": {"vt": scores[0]}}}}}}
    return {"workers": workers, "train": {"stages": stages, "steady_seconds": steady}, "tasks": [needles, ruler]}


def test_scores_are_means_over_seeds_by_length() -> None:
    parts = task_parts("extend", {("moba",): {0: arm((1, 1), [100.0, 50.0]), 1: arm((1, 1), [50.0, 0.0])}})
    lines = parts[1].splitlines()
    assert lines[0] == "| arm | task | seeds | 1,024 | 2,048 |"
    assert "| moba | needles at depths of 0, 100 % | 2 | 75 / 25 |  |" in lines
    assert "| moba | needles, moba | 2 | 50 ± 25 |  |" in lines  # 75 and 25
    assert "| moba | RULER vt, moba | 2 |  | 75 ± 25 |" in lines


def test_a_suite_that_failed_is_named() -> None:
    broken = arm((1, 1), [0.0, 0.0]) | {"tasks": [{"suite": "ruler", "error": "UserError: no"}]}
    assert task_parts("start", {(): {3: broken}}) == ["start, seed 3: ruler failed: UserError: no"]


def test_time_is_per_million_tokens_of_each_stage_and_beside_the_baseline() -> None:
    arms: Arms = {("full",): {0: arm((4, 16), [0, 0])}, ("moba",): {0: arm((2, 4), [0, 0])}}
    rows = time_parts("extend", GROUP, arms)[1].splitlines()
    assert rows[2:] == [
        "| full | 0 | 2.00 | 4.00 | 0.33 |",
        "| moba | 0 | 1.00 (2.00 × faster) | 1.00 (4.00 × faster) | 0.10 |",
    ]
    arms[("moba",)][0]["workers"] = 2  # it shared the GPU: its time compares with nothing
    assert len(time_parts("extend", GROUP, arms)[1].splitlines()) == 3
