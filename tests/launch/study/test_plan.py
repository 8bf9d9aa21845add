from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import UserError
from conf.schema import StudyConfig
from conf.validate import validate
from launch.study.places import Places
from launch.study.plan import START, Arm, arms_of, filled, load_plan, plan_names, scale_of, with_start

NAMES = ("extension", "granularity", "parity", "sft_hybrid", "speed", "trailing")


def arms(name: str, scale: str, **more: object) -> list[Arm]:
    return arms_of(load_plan(name), StudyConfig(name=name, scale=scale, **more))  # type: ignore[arg-type]


def test_the_plans_are_those_promised() -> None:
    assert tuple(plan_names()) == NAMES
    for name in NAMES:
        plan = load_plan(name)
        assert plan.expected and plan.question and plan.differs and {"tiny", "h200"} <= set(plan.scales)


@pytest.mark.parametrize("scale", ["tiny", "h200"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "speed"])
def test_arms_compose_and_validate(name: str, scale: str) -> None:
    plan, config = load_plan(name), StudyConfig(name=name, scale=scale, seeds=[0])
    values, found = scale_of(plan, config), arms_of(plan, config)
    assert len({arm.name for arm in found}) == len(found)
    first = {arm.group: arm for arm in reversed(found)}
    last = {arm.group: arm for arm in found}
    for arm in {arm.name: arm for arm in [*(first.values() if scale == "h200" else ()), *last.values()]}.values():
        group = plan.groups[arm.group]
        # The start is a folder that is not there yet; its tokenizer would fill in the size that training one has.
        lines = [line for line in with_start(arm, Path("runs")) if not line.startswith("init.")]
        resolved = compose(
            "train", ["out=runs/x", "data.tokenizer.path=x", *lines, *Places.of(config).set_overrides(group)]
        )
        validate(resolved, 1)
        assert resolved.seed == arm.seed
        for at in group.losses:
            seq_len, trailing = filled([at.seq_len, at.trailing], values)
            assert int(trailing) < int(seq_len) and (int(trailing) > 0) != at.whole


def test_arms_compare_like_with_like() -> None:
    """Full and MoBA of one size and seed differ in attention and in nothing else."""
    found = {arm.name: arm for arm in arms("parity", "h200")}
    full, moba = found["train-m-full-s1"], found["train-m-moba-s1"]
    assert {line for line in set(full.overrides) ^ set(moba.overrides) if "attention" not in line} == set()


def test_seeds_come_one_after_another_and_starts_come_first() -> None:
    found = arms("trailing", "h200", seeds=[3, 5])
    names = [arm.name for arm in found]
    assert names[0] == "base-s3" and "base-s5" not in names  # a base has the first seed alone
    assert [arm.seed for arm in found if arm.group == "train"] == [3] * 3 + [5] * 3
    assert all(arm.starts in names[: names.index(arm.name)] for arm in found if arm.starts)


def test_only_what_is_asked_for_and_needed_is_run() -> None:
    found = arms("extension", "tiny", arms=["extend-moba"])
    assert [arm.name for arm in found] == ["base-s0", "start-s0", "extend-moba-s0"]
    assert any(START in line for line in found[-1].overrides)
    assert "init.checkpoint=runs/start-s0" in with_start(found[-1], Path("runs"))


def test_a_scale_may_leave_choices_out() -> None:
    assert {arm.choices.get("full_layers") for arm in arms("sft_hybrid", "tiny")} == {None, "0", "1", "8"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StudyConfig(name="nothing"), "study nothing: there is none; choose from .*parity"),
        (StudyConfig(name="parity", scale="huge"), "scale=huge: study parity has only tiny, h200"),
        (
            StudyConfig(name="parity", arms=["nobody"]),
            r"arms=\['nobody'\]: none begins so; there are .*train-s-full-s0",
        ),
    ],
)
def test_bad_names_are_told(config: StudyConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        arms_of(load_plan(config.name), config)


def test_a_value_that_the_scale_lacks_is_told() -> None:
    with pytest.raises(UserError, match="no value 'block'"):
        filled(["x={block}"], {})
    assert filled(["@more", "a={b}"], {"more": ["c={b}"], "b": 2}) == ["c=2", "a=2"]
