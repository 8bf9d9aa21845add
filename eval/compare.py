"""A page that compares checkpoints, from the results in their `out` folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.paths import RunPaths
from eval import compare_plots, page, task_plots
from eval.files import write_atomic
from eval.page import Html
from eval.pictures import Pictures
from eval.report import read_result

Json = dict[str, Any]
SUITES = ("loss", "ruler", "ruler-local", "needle", "gate", "lm_eval")


def write_comparison(out: Path, folders: Sequence[Path]) -> Path:
    """Draw the plots and write the page.

    Args:
        out: receives `plots/*.png` and `report.html`.
        folders: `out` folders of earlier evaluations, in the order of the page.
    """
    found = [{suite: read_result(folder, suite) for suite in SUITES} for folder in folders]
    named = dict(zip(_names(found, folders), found, strict=True))
    draw = Pictures(RunPaths(out).plots)
    content = page.page(
        f"Comparison of {len(named)} checkpoints",
        " · ".join(named),
        _overview(named),
        _losses(named, draw),
        *(_ruler(named, benchmark, draw) for benchmark in ("ruler", "ruler-local")),
        _needles(named),
        _harness(named),
        _where(named, folders),
    )
    report = RunPaths(out).report
    write_atomic(report, content.encode())
    return report


def _names(found: Sequence[Json], folders: Sequence[Path]) -> list[str]:
    """Names of the checkpoints; a number behind those that occur twice."""
    names = []
    for results, folder in zip(found, folders, strict=True):
        about = next((result["checkpoint"] for result in results.values() if result), {"name": folder.name})
        names.append(str(about["name"]))
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _estimate(value: Json) -> str:
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.4f}"
    return _number(value["loss"], 4) + error


def _overview(named: dict[str, Json]) -> Html:
    """One line for each checkpoint and attention."""
    rows = []
    for name, results in named.items():
        loss, ruler, needle, gate = (results[suite] or {} for suite in ("loss", "ruler", "needle", "gate"))
        plans = dict.fromkeys(plan for result in (loss, ruler, needle) for plan in result.get("plans", {}))
        about: Json = next((result["checkpoint"] for result in results.values() if result), {})
        layers = [layer for layer in gate.get("layers", []) if layer["queries"]]
        kept = [share for layer in layers for share in layer["mass_kept"]]
        for plan in plans:
            report, scores = loss.get("plans", {}).get(plan), ruler.get("plans", {}).get(plan)
            found = needle.get("plans", {}).get(plan)
            rows.append(
                (
                    name,
                    plan,
                    f"{about['tokens']:,}" if about.get("tokens") is not None else "–",
                    _estimate(report["heldout"]) if report else "–",
                    _estimate(report["trailing"]) if report else "–",
                    _number(scores["mean"], 1) if scores else "–",
                    _number(found["mean"], 1) if found else "–",
                    f"{100 * sum(kept) / len(kept):.1f} %" if kept and plan == "moba" else "–",
                )
            )
    head = (
        "checkpoint",
        "attention",
        "tokens seen",
        "held-out loss",
        "trailing loss",
        "RULER",
        "needle",
        "mass kept",
    )
    return page.section(
        "Overview",
        page.table(head, rows),
        page.paragraph(
            "Losses in nats per token ± standard error over documents; RULER and needle in percent, means over "
            "all tasks and lengths run.",
            note=True,
        ),
        _unequal(named),
    )


def _unequal(named: dict[str, Json]) -> Html | None:
    """A warning where numbers of a column do not come from the same data or settings."""
    warnings = []
    losses = [results["loss"] for results in named.values() if results["loss"]]
    if len({loss["data"]["fingerprint"] for loss in losses}) > 1:
        warnings.append("losses are of different data or tokenizers")
    if len({loss["seq_len"] for loss in losses}) > 1:
        warnings.append("losses are at different lengths")
    rulers = [results["ruler"] for results in named.values() if results["ruler"]]
    settings = {_ruler_settings(ruler) for ruler in rulers}
    if len(settings) > 1:
        warnings.append("RULER was run with different tasks, lengths or samples")
    return page.paragraph(f"Not comparable as they stand: {'; '.join(warnings)}.") if warnings else None


def _ruler_settings(ruler: Json) -> tuple[Any, ...]:
    first = next(iter(ruler["plans"].values()))
    return (*first["tasks"], *first["lengths"], first["samples"])


def _losses(named: dict[str, Json], draw: Pictures) -> Html | None:
    losses = {name: results["loss"] for name, results in named.items() if results["loss"]}
    if not losses:
        return None
    rows = [
        (name, _estimate(loss["difference"]["heldout"]), _estimate(loss["difference"]["trailing"]))
        for name, loss in losses.items()
        if loss.get("difference")
    ]
    return page.section(
        "Loss",
        draw(
            "compare-position",
            lambda theme: compare_plots.losses_by_position(losses, theme),
            "Loss by position of every checkpoint",
            "Loss by position in documents that reach the full length. Solid: full attention; dashed: MoBA.",
        ),
        page.table(("MoBA minus full, paired", "held-out loss", "trailing loss"), rows) if rows else None,
    )


def _ruler(named: dict[str, Json], benchmark: str, draw: Pictures) -> Html | None:
    rulers = {name: results[benchmark] for name, results in named.items() if results[benchmark]}
    if not rulers:
        return None
    columns = [
        (f"{name}, {plan}", report) for name, ruler in rulers.items() for plan, report in ruler["plans"].items()
    ]
    lengths = sorted({int(length) for _, report in columns for length in report["lengths"]})
    rows = []
    for title, report in columns:
        cells = (report["lengths"].get(str(length)) for length in lengths)
        effective = f"{report['effective_length'] or 0:,}" if report["all_tasks"] else "–"
        rows.append((title, *("–" if cell is None else f"{cell['mean']:.1f}" for cell in cells), effective))
    by_task = {task: None for _, report in columns for task in report["tasks"]}
    details = [(task, *(_task_mean(report, task) for _, report in columns)) for task in by_task]
    title = benchmark.replace("ruler", "RULER")
    merged = {"plans": dict(columns)}
    return page.section(
        title,
        page.table(("mean over tasks at", *(f"{n:,}" for n in lengths), "effective length"), rows),
        page.folded("Tasks, mean over lengths", page.table(("task", *(name for name, _ in columns)), details)),
        draw(
            f"compare-{benchmark}",
            lambda theme: task_plots.ruler_heatmap(merged, theme),
            f"{title} of every checkpoint",
            "Scores by task and prompt length, in percent.",
        )
        if len({_ruler_settings(ruler) for ruler in rulers.values()}) == 1 and len(columns) <= 4
        else None,
    )


def _task_mean(report: Json, task: str) -> str:
    scores = [cell["scores"][task] for cell in report["lengths"].values() if task in cell["scores"]]
    return f"{sum(scores) / len(scores):.1f}" if scores else "–"


def _needles(named: dict[str, Json]) -> Html | None:
    rows = []
    for name, results in named.items():
        needle = results["needle"] or {"grids": {}}
        for plan, grid in needle["grids"].items():
            for i, length in enumerate(needle["lengths"]):
                rows.append((name, plan, f"{length:,}", f"{sum(line[i] for line in grid) / len(grid):.1f}"))
    return (
        page.section("Needle", page.table(("checkpoint", "attention", "length", "found, %"), rows))
        if rows
        else None
    )


def _harness(named: dict[str, Json]) -> Html | None:
    columns = [
        (f"{name}, {plan}", report)
        for name, results in named.items()
        for plan, report in (results["lm_eval"] or {"plans": {}})["plans"].items()
    ]
    pairs = {
        (task, metric): None for _, report in columns for task, row in report.items() for metric in row["metrics"]
    }
    rows = [
        (
            task,
            metric,
            *(_number(report.get(task, {"metrics": {}})["metrics"].get(metric), 4) for _, report in columns),
        )
        for task, metric in pairs
    ]
    head = ("task", "metric", *(name for name, _ in columns))
    return page.section("lm-eval tasks", page.table(head, rows)) if rows else None


def _where(named: dict[str, Json], folders: Sequence[Path]) -> Html:
    rows = [(name, folder.name) for name, folder in zip(named, folders, strict=True)]
    note = "Each folder has a page of its own, report.html."
    return page.section(
        "Checkpoints", page.table(("checkpoint", "results in"), rows), page.paragraph(note, note=True)
    )
