"""`moba bench step`: measure whole optimizer steps, row by row, with the planner's prediction beside each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.compose import compose
from conf.errors import complain
from conf.ranges import check_fields
from conf.schema import StepBenchConfig
from launch.command import Command, console
from launch.local import start_workers, torchrun_command

if TYPE_CHECKING:
    from train.bench_cases import Case

Row = dict[str, Any]


def resolve(overrides: Sequence[str]) -> StepBenchConfig:
    return compose("bench_step", overrides)


def run(config: StepBenchConfig) -> int:
    """Measure the rows, write the results and their picture, print the table. Returns the exit code."""
    from eval.files import write_json
    from launch.step_report import add_predictions, draw, merged, print_table
    from train.bench_cases import cases_of

    check_fields(config)
    cases = cases_of(config)
    for case in cases:
        _check(case)
    rows, code = _measure(config, cases)
    if rows:
        add_predictions(rows, cases, config.gpu)
        out = Path(config.out)
        report = merged(out, rows)
        write_json(out, report)
        draw(report, out.with_suffix(".png"))
        print_table(rows, console())
        print(f"wrote {out} and {out.with_suffix('.png')}")
    return code


def _check(case: Case) -> None:
    """The rules of a training run, with made-up data."""
    from conf.schema import DataSetConfig
    from conf.validate import validate
    from train.bench_cases import STAGE, train_config

    nproc, parallel = case.config.launch.nproc, case.config.mesh.sequence_parallel
    config = train_config(case, max(1, nproc // parallel))
    config.data.sets = {"random": DataSetConfig(path="random", source="random")}
    config.data.tokenizer.train_vocab_size = min(4096, config.model.vocab_size)
    config.stages[STAGE].data.domains = {"random": 1.0}
    config.eval.tokens = 0
    validate(config, nproc)


def _measure(config: StepBenchConfig, cases: Sequence[Case]) -> tuple[list[Row], int]:
    """Start the workers until every row has been tried. Returns rows and the exit code."""
    from conf.load import save_config
    from train.bench_step import read_rows

    with tempfile.TemporaryDirectory(prefix="moba-bench-") as folder:
        settings, results = Path(folder) / "config.yaml", Path(folder) / "rows.jsonl"
        save_config(config, settings)
        nproc = config.launch.nproc
        command = torchrun_command(nproc, Path(folder), "train.bench_step", str(settings), str(results))
        code, rows = 0, list[Row]()
        while len(rows) < len(cases):
            code = start_workers(command, config.launch)
            before, rows = len(rows), read_rows(results)
            if len(rows) == before:  # not one row further: the fault is no row's own
                complain(f"the workers ended with code {code} before {cases[before].text} was measured")
                return rows, code or 1
        return rows, 0 if any("error" not in row for row in rows) else code or 1


COMMAND = Command(
    name="bench step",
    summary="time whole optimizer steps: tokens/s, MFU, memory and where the time goes",
    text="""
Runs optimizer steps of a model on synthetic tokens through the engine of training, for each length and attention
plan: tokens/s, MFU (useful FLOPs only: causal pairs for full attention, selected pairs for MoBA, nothing for what
is computed twice), peak memory with the planner's prediction beside it, and the time of each part. A row that does
not fit is reported as such and the next one follows.
""",
    examples=(
        "moba bench step",
        "moba bench step lengths=[8192,32768] plans=[full,2048x3,512x8] out=benchmarks/results/step-h200.json",
        "moba bench step sweep=[8192/full,1048576/4096x12/engine.zero_stage:2]",
        "moba bench step model=tiny lengths=[256] plans=[full,32x3] out=/tmp/step.json   # on a CPU",
    ),
    resolve=resolve,
    run=run,
)
