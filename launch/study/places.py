"""Where a study keeps things: its data, the run folders of its arms, its results."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from conf.schema import StudyConfig
from launch.study.plan import Arm, Group, load_plan, scale_of
from launch.study.stats import UNFINISHED

RESULTS = Path("docs/results")
SETS = ("text", "chat", "synthetic", "synthetic_short", "synthetic_copy")
RECIPES = {
    "recipe=study": ["text"],
    "recipe=study_base": ["text"],
    "recipe=study_copy": ["text", "synthetic_copy"],
    "recipe=study_sft": ["chat"],
    "recipe=study_retrieval": ["text", "synthetic", "synthetic_short"],
    "recipe=study_extend": ["text", "synthetic", "synthetic_short"],
}


@dataclass(frozen=True)
class Places:
    """`out` holds page, plots and `arms/*.json`; `runs` a run folder per arm; `data` the prepared sets by name."""

    out: Path
    runs: Path
    data: Path

    @classmethod
    def of(cls, config: StudyConfig) -> Places:
        values = {} if config.name == "list" else scale_of(load_plan(config.name), config)
        runs = Path(config.runs or f"runs/study/{config.name}-{config.scale}")
        small = config.scale == "tiny"
        out = Path(config.out) if config.out else runs / "results" if small else RESULTS / config.name
        own = "-" + hashlib.sha256(repr(config.text).encode()).hexdigest()[:8] if config.text else ""
        return cls(out, runs, Path(config.dataset or f"runs/data/study-{values.get('chars', 0)}{own}"))

    def result(self, arm: Arm) -> Path:
        return self.result_of(arm.name)

    def result_of(self, name: str) -> Path:
        return self.out / "arms" / f"{name}.json"

    def unfinished(self, arm: Arm) -> Path:
        """What is known of an arm that is being measured; gone when its result is there."""
        return self.out / UNFINISHED / f"{arm.name}.json"

    def sets(self) -> dict[str, Path]:
        """Every set by name, whether it is there or not."""
        return {name: self.data / name for name in SETS}

    def set_overrides(self, group: Group) -> list[str]:
        """Where a group's recipe finds its sets, which are there: nothing is to be made of a source again."""
        names = used_sets(group)
        made = [f"data.sets.{name}.source=''" for name in names if name.startswith("synthetic")]
        return [*(f"data.sets.{name}.path={self.data / name}" for name in names), *made]


def used_sets(group: Group) -> list[str]:
    """The sets of a group's recipe, which is its first override."""
    return RECIPES[group.overrides[0]]
