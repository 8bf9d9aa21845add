"""Tables and progress bars in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")


def _console() -> Console:
    """Into files and pipes as wide as the tables need: no digit is cut off."""
    return Console(width=None if sys.stdout.isatty() else 160)


def say(line: str) -> None:
    _console().print(escape(line), soft_wrap=True)


class Reporter:
    """Progress of loops and of numbered steps."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def __call__(self, what: str, items: Iterable[T], total: int) -> Iterator[T]:
        yield from self._bars.track(items, total=max(total, 1), description=what)

    def counter(self) -> Callable[[str, int, int], None]:
        """A function (what, done, of how many); another `what` starts another line."""
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(tasks[what], completed=done)

        return step


@contextmanager
def progress() -> Iterator[Reporter]:
    """Bars while the block runs. They vanish at its end; without a terminal nothing is drawn."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not Console().is_terminal) as bars:
        yield Reporter(bars)


def show(suite: str, result: dict[str, Any]) -> None:
    """Print the table of a suite's result."""
    makers = {"loss": _loss, "ruler": _ruler, "needle": _needle, "gate": _gate, "lm_eval": _harness}
    _console().print(makers[suite](result))
    if suite == "gate" and result["grid"]:
        _console().print(_gate_grid(result))


def _estimate(value: dict[str, Any]) -> str:
    if value["loss"] is None:
        return "-"
    loss = value["loss"] if round(value["loss"], 4) else 0.0
    return f"{loss:.4f}" + ("" if value["stderr"] is None else f" ± {value['stderr']:.4f}")


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    return made


def _loss(result: dict[str, Any]) -> Table:
    made = _table(
        f"Loss at {result['seq_len']:,} tokens (nats per token)",
        "attention",
        "held out",
        "tokens",
        f"last {result['trailing_tokens']:,} tokens",
        "tokens",
        "documents",
    )
    rows = dict(result["plans"]) | ({"difference": result["difference"]} if result["difference"] else {})
    for name, report in rows.items():
        held, trailing = report["heldout"], report["trailing"]
        made.add_row(
            name,
            _estimate(held),
            f"{held['tokens']:,}",
            _estimate(trailing),
            f"{trailing['tokens']:,}",
            str(trailing["documents"]),
        )
    return made


def _ruler(result: dict[str, Any]) -> Table:
    plans, trained = result["plans"], result["checkpoint"]["seq_len"]
    first = next(iter(plans.values()))
    lengths = list(first["lengths"])
    heads = [f"{int(n):,}" + ("*" if int(n) > trained else "") for n in lengths]
    title = result["benchmark"].replace("ruler", "RULER")
    made = _table(f"{title}, {first['samples']} samples a task (percent)", "attention", "task", *heads)
    for name, plan in plans.items():
        for task in plan["tasks"]:
            made.add_row(name, task, *(f"{plan['lengths'][n]['scores'][task]:.1f}" for n in lengths))
        made.add_row(name, "mean", *(f"{plan['lengths'][n]['mean']:.1f}" for n in lengths), end_section=True)
    if any(int(n) > trained for n in lengths):
        made.caption = f"* longer than the checkpoint's {trained:,} tokens"
    return made


def _gate(result: dict[str, Any]) -> Table:
    made = _table(
        f"Gate on a document of {result['seq_len']:,} tokens: share of full attention's mass",
        "layer",
        "kept",
        "best possible",
        "nearest",
        "own block",
    )
    for layer in result["layers"]:
        shares = [layer[key] for key in ("mass_kept", "mass_best", "mass_window", "mass_own")]
        made.add_row(str(layer["layer"]), *(f"{100 * sum(s) / len(s):.1f} %" if s else "-" for s in shares))
    return made


def _gate_grid(result: dict[str, Any]) -> Table:
    made = _table(
        "Other settings, on the same weights under full attention", "block size", "topk", "keys read", "kept"
    )
    for cell in result["grid"]:
        shares = (f"{100 * cell[key]:.1f} %" for key in ("read", "kept"))
        made.add_row(f"{cell['block_size']:,}", str(cell["topk"]), *shares)
    return made


def _needle(result: dict[str, Any]) -> Table:
    heads = [f"{name} {length:,}" for name in result["grids"] for length in result["lengths"]]
    made = _table("Needles found (percent)", "depth", *heads)
    for i, depth in enumerate(result["depths"]):
        made.add_row(f"{depth} %", *(f"{score:.0f}" for grid in result["grids"].values() for score in grid[i]))
    return made


def _harness(result: dict[str, Any]) -> Table:
    plans = result["plans"]
    made = _table("lm-eval", "task", "metric", "shots", *plans)
    for task, row in next(iter(plans.values())).items():
        for metric in row["metrics"]:
            scores = (f"{plan[task]['metrics'][metric]:.4f}" for plan in plans.values())
            made.add_row(task, metric, str(row["shots"]), *scores)
    return made
