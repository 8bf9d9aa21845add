"""A study's plan: conf/study/NAME.yaml read into arms, each the overrides of one `moba train`.

A plan has groups of arms, run in order. A group's arms are the product of its axes and of the scale's seeds; `starts`
names a group whose arm of the same seed (or of its only seed) an arm starts from. `{name}` in an override is a value
of the scale, and an override that is `@name` alone stands for a list of the scale.
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
START = "START"  # in overrides: the run folder that the arm starts from


@dataclass
class LossAt:
    """Losses over the first `seq_len` tokens of held-out documents, the last `trailing` of them apart."""

    seq_len: str = ""
    trailing: str = ""
    buckets: int = 16
    documents: str = "64"
    set: str = "text"  # text | chat


@dataclass
class Group:
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    starts: str = ""
    first_seed_only: bool = False
    losses: list[LossAt] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)  # overrides of `moba eval suite=ruler|needle`, a line each


@dataclass
class Plan:
    """`expected` was written before any run; `differs` says where the paper did something else."""

    title: str = ""
    paper: str = ""
    question: str = ""
    expected: str = ""
    differs: str = ""
    groups: dict[str, Group] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)  # of the attention benchmark: only the study of speed
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
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def load_plan(name: str) -> Plan:
    """Raises UserError: no such plan, or one that is not well formed."""
    path = PLANS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"study {name}: there is none; choose from {', '.join(plan_names())} (moba study list)")
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
    seeds = list(config.seeds or values["seeds"])
    found: list[Arm] = []
    for seed in seeds:
        for name, group in plan.groups.items():
            if seed == seeds[0] or not group.first_seed_only:
                found += _group_arms(plan, name, group, seed, seeds[0], values)
    wanted = {arm.name for arm in found if any(arm.name.startswith(prefix) for prefix in config.arms or [""])}
    if not wanted:
        raise UserError(f"arms={config.arms}: none begins so; there are {', '.join(arm.name for arm in found)}")
    wanted |= {arm.starts for arm in found if arm.name in wanted}  # what others start from is run too
    return [arm for arm in found if arm.name in wanted]


def _group_arms(
    plan: Plan, name: str, group: Group, seed: int, first_seed: int, values: Mapping[str, Any]
) -> list[Arm]:
    arms = []
    for picked in itertools.product(*(options.items() for options in group.axes.values())):
        choices = dict(zip(group.axes, (choice for choice, _ in picked), strict=True))
        if not set(choices.values()) <= set(values.get("choices", choices.values())):
            continue
        lines = [*group.overrides, *(line for _, lines in picked for line in lines), f"seed={seed}"]
        start = ""
        if group.starts:
            start = f"{group.starts}-s{first_seed if plan.groups[group.starts].first_seed_only else seed}"
        label = "-".join([name, *choices.values(), f"s{seed}"])
        arms.append(Arm(label, name, seed, choices, tuple(filled(lines, values)), start))
    return arms


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
