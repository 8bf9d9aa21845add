"""The rows of `moba bench step`: which configurations are measured, as training configurations of one stage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import UserError
from conf.schema import StageConfig, StageRopeConfig, StepBenchConfig, TrainConfig

STAGE = "bench"
_PLAN = re.compile(r"(\d+)x(\d+)")
_GROUPS = ("engine", "mesh", "attention")
_KEYS = (*_GROUPS, "steps", "warmup", "parts")  # what a row may set


@dataclass(frozen=True)
class Case:
    """One row: a sequence length, an attention plan (`full` or `BLOCKxTOPK`) and the settings around them."""

    seq_len: int
    plan: str
    settings: tuple[str, ...]  # KEY:VALUE, on top of the benchmark's own
    config: StepBenchConfig

    @property
    def text(self) -> str:
        """The row as one would write it in `sweep`, without how often it is measured."""
        settings = [item for item in self.settings if re.split("[.:]", item)[0] in _GROUPS]
        return "/".join((str(self.seq_len), self.plan, *settings))


def cases_of(config: StepBenchConfig) -> list[Case]:
    """The rows asked for: `sweep`, or every one of `lengths` with every one of `plans`.

    Raises:
        UserError: a row that cannot be read, naming it.
    """
    rows = config.sweep or [f"{length}/{plan}" for length in config.lengths for plan in config.plans]
    if not rows:
        raise UserError("nothing to measure: give lengths=[8192] and plans=[full,512x3], or sweep=[8192/full]")
    return [_case(row, config) for row in rows]


def train_config(case: Case, dp_world: int) -> TrainConfig:
    """The training configuration that `case` measures: one stage, one sequence per data-parallel rank and step."""
    ours = case.config
    total = ours.warmup + ours.steps + 2  # the passes around the timed steps count as steps too
    stage = StageConfig(
        case.seq_len, case.seq_len * dp_world * total, dp_world, rope=StageRopeConfig(theta=500_000.0),
        attention=ours.attention,
    )  # fmt: skip
    stage.lr.peak, stage.lr.schedule, stage.lr.warmup = 1e-6, "constant", 0.0
    return TrainConfig(
        out="bench", model=ours.model, stages={STAGE: stage}, optim=ours.optim, engine=ours.engine, mesh=ours.mesh,
        launch=ours.launch,
    )  # fmt: skip


def _case(row: str, config: StepBenchConfig) -> Case:
    words = row.split("/")
    if len(words) < 2 or not words[0].isdigit():
        raise UserError(f"sweep: cannot read '{row}': a row is TOKENS/PLAN[/KEY:VALUE...], as 8192/512x3")
    length, plan, *settings = words
    wrong = [item for item in settings if ":" not in item or re.split("[.:]", item)[0] not in _KEYS]
    if wrong:
        raise UserError(f"sweep: '{wrong[0]}' in '{row}': a row sets KEY:VALUE of {', '.join(_KEYS)}, as steps:1")
    matched = _PLAN.fullmatch(plan)
    if plan != "full" and matched is None:
        raise UserError(f"sweep: plan '{plan}' in '{row}': write full or BLOCKxTOPK, as 512x3")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(config), OmegaConf.from_dotlist([item.replace(":", "=", 1) for item in settings])
        )
        own = cast(StepBenchConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"sweep: '{row}': {str(error).splitlines()[0]}") from error
    own.attention.kind = "moba" if matched else "full"
    if matched:
        own.attention.block_size, own.attention.topk = int(matched[1]), int(matched[2])
    return Case(int(length), plan, tuple(settings), own)
