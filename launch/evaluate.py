"""`moba eval`: evaluate a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import EvalConfig
from launch.command import Command


def resolve(overrides: Sequence[str]) -> EvalConfig:
    return compose("eval", overrides)


def run(config: EvalConfig) -> int:
    from eval.run import run as run_evaluation

    check_fields(config)
    run_evaluation(config)
    return 0


COMMAND = Command(
    name="eval",
    summary="evaluate a checkpoint: losses, RULER tasks, the gate's choices; writes a report",
    text="""
Prints tables and writes eval/*.json, plots/*.png and report.html under `out`.
suite=loss: held-out, position-wise and trailing loss. suite=ruler: long-context tasks.
suite=gate: which blocks queries choose.
""",
    examples=(
        "moba eval checkpoint=runs/x out=runs/x",
        "moba eval checkpoint=runs/x out=runs/x suite=ruler ruler.lengths=[2048] ruler.samples=50",
        "moba eval checkpoint=runs/x/hf out=runs/y dataset=runs/data/stdlib attention=moba_fine attention.topk=8",
    ),
    resolve=resolve,
    run=run,
)
