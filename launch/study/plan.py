"""A study's plan: conf/study/NAME.yaml read into arms, each the overrides of one `moba train`.

A plan has groups of arms, run in order. A group's arms are the product of its axes and of the scale's seeds.
`starts` names the arm, without its seed, that an arm starts from, with `{axis}` for its own choice on that axis.
`{name}` in an override is a value of the scale, and an override that is `@name` alone stands for a list of the
scale. A plan with `base: true` has the groups and values of conf/study/_base.yaml too; its own come first where
both have one.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from conf.compose import CONF
from conf.errors import UserError
from conf.load import to_typed
from conf.schema import StudyConfig

PLANS = CONF / "study"
BASE = PLANS / "_base.yaml"
START = "START"  # in overrides: the run folder that the arm starts from


@dataclass
class LossAt:
    """Losses over the first `seq_len` tokens of held-out documents, the last `trailing` of them apart.

    `whole`: of all targets of documents of `seq_len` / 2 to `seq_len` tokens instead, nothing apart: of answers.
    """

    seq_len: str = ""
    trailing: str = "0"
    buckets: int = 16
    documents: str = "64"
    set: str = "text"  # text | chat | synthetic
    whole: bool = False


@dataclass
class Group:
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    starts: str = ""
    baseline: str = ""  # axis=choice that the others are compared with
    first_seed_only: bool = False
    losses: list[LossAt] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)  # overrides of `moba eval suite=ruler|needle`, a line each


@dataclass
class Plan:
    """`expected` was written before any run; `differs` says where the paper did something else.

    `expected_later`: of groups that were added when results of others were known.
    """

    title: str = ""
    paper: str = ""
    question: str = ""
    expected: str = ""
    expected_later: str = ""
    found: str = ""  # by scale h200: what the numbers mean, written after the run
    differs: str = ""
    base: bool = False
    groups: dict[str, Group] = field(default_factory=dict)
    timed: bool = False  # no arms: attention is timed at the rows of the scale
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One training with its measurements. `name` is also the name of its run folder and of its JSON file."""

    name: str
    group: str
    seed: int
    choices: dict[str, str]  # axis -> choice
    overrides: tuple[str, ...]
    starts: str  # arm it starts from; empty: fresh weights


def plan_names() -> list[str]:
    return sorted(path.stem for path in PLANS.glob("*.yaml") if not path.name.startswith("_"))


def load_plan(name: str) -> Plan:
    """Raises UserError: no such plan, or one that is not well formed."""
    path = PLANS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"study {name}: there is none; choose from {', '.join(plan_names())} (moba study list)")
    plan = _read(path)
    if plan.base:
        base = _read(BASE)
        plan.groups = {**base.groups, **plan.groups}
        plan.scales = {name: {**base.scales.get(name, {}), **values} for name, values in plan.scales.items()}
    return plan


def _read(path: Path) -> Plan:
    try:
        raw = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no plain YAML: {' '.join(str(error).split())}") from error
    return to_typed(raw, Plan, str(path))


def scale_of(plan: Plan, config: StudyConfig) -> dict[str, Any]:
    """The values of the scale asked for. Raises UserError for one that the plan does not have."""
    if config.scale not in plan.scales:
        raise UserError(f"scale={config.scale}: study {config.name} has only {', '.join(plan.scales)}")
    return plan.scales[config.scale]


def arms_of(plan: Plan, config: StudyConfig) -> list[Arm]:
    """All arms asked for in the order of running: seed by seed, so that a run cut short has whole comparisons."""
    values = scale_of(plan, config)
    seeds = list(config.seeds or values.get("seeds", [0]))
    found: list[Arm] = []
    for seed in seeds:
        for name, group in plan.groups.items():
            if seed == seeds[0] or not group.first_seed_only:
                found += _group_arms(plan, name, group, seed, seeds[0], values)
    started = {arm.starts for arm in found}
    prefixes = tuple(config.arms or [""])
    # A base is trained for those that start from it; by itself only when it is asked for by name.
    wanted = {a.name for a in found if a.name.startswith(prefixes) and (a.group != "base" or config.arms)}
    if not wanted:
        raise UserError(f"arms={config.arms}: none begins so; there are {', '.join(arm.name for arm in found)}")
    for arm in reversed(found):  # what others start from is run too, and stands before them
        if arm.name in wanted and arm.starts:
            wanted.add(arm.starts)
    unknown = started - {arm.name for arm in found} - {""}
    if unknown:
        raise UserError(f"study {config.name}: an arm starts from {unknown.pop()}, which is no arm")
    return [arm for arm in found if arm.name in wanted]


def _group_arms(
    plan: Plan, name: str, group: Group, seed: int, first_seed: int, values: Mapping[str, Any]
) -> list[Arm]:
    arms = []
    only = set(values.get("choices", ()))  # of the axes that have any of them
    axes = [
        [item for item in own.items() if item[0] in only or not only & set(own)] for own in group.axes.values()
    ]
    for picked in itertools.product(*axes):
        choices = dict(zip(group.axes, (choice for choice, _ in picked), strict=True))
        lines = [*group.overrides, *(line for _, own in picked for line in own), f"seed={seed}"]
        start = _start_name(plan, group, choices, seed, first_seed)
        label = "-".join([name, *choices.values(), f"s{seed}"])
        arms.append(Arm(label, name, seed, choices, tuple(filled(lines, values)), start))
    return arms


def _start_name(plan: Plan, group: Group, choices: Mapping[str, str], seed: int, first_seed: int) -> str:
    if not group.starts:
        return ""
    arm = group.starts.format(**choices)
    owner = plan.groups[arm.partition("-")[0]]
    return f"{arm}-s{first_seed if owner.first_seed_only else seed}"


def filled(lines: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """The lines with the values of the scale in them."""
    out: list[str] = []
    for line in lines:
        try:
            if line.startswith("@"):
                out += filled([str(item) for item in values[line[1:]]], values)
            else:
                names = [name for _, name, _, _ in string.Formatter().parse(line) if name]
                out.append(line.format(**{name: values[name] for name in names}))
        except KeyError as error:
            raise UserError(f"the scale has no value {error}, which '{line}' asks for") from error
    return out


def with_start(arm: Arm, runs: Path) -> list[str]:
    """The arm's overrides with the place of the run that it starts from."""
    return [line.replace(START, str(runs / arm.starts)) for line in arm.overrides]
