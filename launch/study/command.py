"""`moba study`: the paper's claims on small models, one plan and one command each."""

from __future__ import annotations

from collections.abc import Sequence

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import StudyConfig
from launch.command import Command, console


def resolve(overrides: Sequence[str]) -> StudyConfig:
    """`moba study NAME key=value ...`; the name may come first without its key."""
    named = [f"name={overrides[0]}", *overrides[1:]] if overrides and "=" not in overrides[0] else overrides
    return compose("study", named)


def run(config: StudyConfig) -> int:
    from launch.study.plan import load_plan, plan_names

    check_fields(config)
    if config.name == "list":
        from rich.table import Table

        table = Table("study", "what it repeats", "in the MoBA report", "scales", box=None, pad_edge=False)
        for name in plan_names():
            plan = load_plan(name)
            table.add_row(f"[bold]{name}[/]", plan.title, plan.paper, ", ".join(plan.scales))
        console().print(table)
        return 0
    from launch.study.run import run as run_study

    return run_study(config)


COMMAND = Command(
    name="study",
    summary="repeat a claim of the paper on small models: arms, seeds, measurements, a page",
    text="""
moba study list shows the plans. A plan (conf/study/NAME.yaml) names arms, seeds, what is expected and, by scale,
all sizes. Every arm is an ordinary run; finished arms are not repeated: the same command goes on where it ended.
Writes arms/*.json, plots and README.md into `out`. The text is what Python and this system have, or text=[FOLDER].
""",
    examples=(
        "moba study list",
        "moba study parity",
        "moba study trailing scale=h200 workers=3 seeds=[0,1]",
        "moba study parity scale=h200 report=true   # page and plots anew",
    ),
    resolve=resolve,
    run=run,
)
