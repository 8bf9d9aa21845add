"""The sections of a report on tasks: RULER, the needle grid, the tasks of lm-eval."""

from __future__ import annotations

from typing import Any

from eval import page, task_plots
from eval.page import Html
from eval.pictures import Pictures
from eval.ruler.score import THRESHOLD

Json = dict[str, Any]
TITLES = {"ruler": "RULER", "ruler-local": "RULER-local"}


def ruler_scores(ruler: Json | None, draw: Pictures) -> Html | None:
    if ruler is None:
        return None
    results, benchmark = ruler["plans"], ruler.get("benchmark", "ruler")
    first = next(iter(results.values()))
    lengths = list(first["lengths"])
    head = ["task", *(f"{name}, {int(length):,}" for length in lengths for name in results)]
    rows = [
        (task, *(_score(result["lengths"][length], task) for length in lengths for result in results.values()))
        for task in [*first["tasks"], "mean"]
    ]
    title = TITLES[benchmark]
    return page.section(
        title,
        page.paragraph(
            "Retrieval, tracing and counting in long prompts: answers found, in percent, by attention "
            "and length in tokens (prompt and answer together)."
        ),
        page.paragraph(
            "The essays are text of this machine, not RULER's: these are scores of another benchmark, not "
            "comparable with published ones."
        )
        if benchmark == "ruler-local"
        else None,
        page.table(head, rows),
        _averages(results, lengths) if len(lengths) > 1 or first["all_tasks"] else None,
        draw(
            benchmark,
            lambda theme: task_plots.ruler_heatmap(ruler, theme),
            f"{title} scores by task and prompt length",
            "Scores by task and prompt length, in percent.",
        ),
        page.paragraph(" ".join(_notes(ruler, first, lengths)), note=True),
    )


def _averages(results: Json, lengths: list[str]) -> Html:
    """Averages over lengths, and the effective length where all thirteen tasks were run."""
    rows = []
    for name, result in results.items():
        effective = "–" if not result["all_tasks"] else f"{result['effective_length'] or 0:,}"
        numbers = (result["mean"], result["weighted_increasing"], result["weighted_decreasing"])
        rows.append((name, *(f"{number:.1f}" for number in numbers), effective))
    head = ("attention", "average", "weighted to long", "weighted to short", f"effective length ({THRESHOLD} %)")
    return page.table(head, rows)


def _notes(ruler: Json, first: Json, lengths: list[str]) -> list[str]:
    trained = ruler["checkpoint"]["seq_len"]
    notes = [f"{first['samples']} samples a task and length (RULER uses 500), greedy, seed {ruler['seed']}."]
    if not first["all_tasks"]:
        notes.append(f"The mean is over these {len(first['tasks'])} tasks; RULER's own is over thirteen.")
    beyond = [f"{int(n):,}" for n in lengths if int(n) > trained]
    if beyond:
        notes.append(f"Longer than the checkpoint's {trained:,} tokens: {', '.join(beyond)}.")
    fills = [share for length in lengths for share in first["lengths"][length]["filled"].values()]
    notes.append(f"Prompts fill {100 * min(fills):.1f} % of their length or more.")
    if ruler.get("texts"):
        hashes = ", ".join(f"{name} {value}" for name, value in ruler["texts"].items())
        notes.append(f"Texts by hash: {hashes}.")
    return notes


def _score(cell: Json, task: str) -> str:
    return f"{cell['mean'] if task == 'mean' else cell['scores'][task]:.1f}"


def needle_grid(needle: Json | None, draw: Pictures) -> Html | None:
    if needle is None:
        return None
    lengths, trained = needle["lengths"], needle["checkpoint"]["seq_len"]
    beyond = [f"{n:,}" for n in lengths if n > trained]
    head = ("depth", *(f"{name}, {length:,}" for name in needle["grids"] for length in lengths))
    rows = [
        (f"{depth} %", *(f"{score:.0f}" for grid in needle["grids"].values() for score in grid[i]))
        for i, depth in enumerate(needle["depths"])
    ]
    longer = f" Longer than the checkpoint's {trained:,} tokens: {', '.join(beyond)}." if beyond else ""
    return page.section(
        "Needle in a haystack",
        page.paragraph(
            f"A seven-digit number hidden at a depth of {needle['haystack']}, and asked for at the end: "
            f"found, in percent of {needle['samples']} samples."
        ),
        draw(
            "needle",
            lambda theme: task_plots.needle_heatmap(needle, theme),
            "Needles found by depth and prompt length",
            "Depth 0 is the start of the prompt.",
        ),
        page.folded("As numbers", page.table(head, rows)),
        page.paragraph(f"Greedy, seed {needle['seed']}.{longer}", note=True),
    )


def harness_scores(harness: Json | None) -> Html | None:
    if harness is None:
        return None
    plans = harness["plans"]
    first = next(iter(plans.values()))
    rows = []
    for task, row in first.items():
        for metric in row["metrics"]:
            cells = (_cell(plan.get(task, {}), metric) for plan in plans.values())
            rows.append((task, metric, "–" if row["shots"] is None else row["shots"], *cells))
    limit = f" At most {harness['limit']} documents a task." if harness["limit"] else ""
    return page.section(
        "lm-eval tasks",
        page.table(("task", "metric", "shots", *plans), rows),
        page.paragraph(f"EleutherAI lm-eval {harness['version']}; ± is the standard error.{limit}", note=True),
    )


def _cell(row: Json, metric: str) -> str:
    if metric not in row.get("metrics", {}):
        return "–"
    error = row["errors"].get(metric)
    return f"{row['metrics'][metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
