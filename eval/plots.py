"""The pictures of a report. Each function draws one figure in a theme and returns it as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.style import Theme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

Row = dict[str, Any]
SMOOTHED = 12  # the smoothed training loss looks back over about 1 / so many of the steps
CONFIDENCE = 1.96  # standard errors on either side of an error band


@contextmanager
def canvas(theme: Theme, width: float, height: float) -> Iterator[Figure]:
    """A figure that no window system and no global state of matplotlib knows of."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(theme.settings()):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def read_metrics(path: Path) -> list[Row]:
    """Rows of a run's `metrics.jsonl`; nothing if there is none."""
    from eval.files import read_lines

    return list(read_lines(path))


def loss_by_tokens(rows: Sequence[Row], theme: Theme) -> bytes | None:
    """Training loss against tokens seen, held-out points, stages as bands, changes of the attention plan as
    marks. None without training rows."""
    train = [row for row in rows if row.get("kind") == "train" and row.get("loss") is not None]
    if not train:
        return None
    tokens, losses = [row["tokens"] for row in train], [row["loss"] for row in train]
    unit, name = (
        (1e9, "billion") if tokens[-1] >= 2e9 else (1e6, "million") if tokens[-1] >= 2e5 else (1e3, "thousand")
    )
    with canvas(theme, 9.2, 4.3) as figure:
        axes = figure.add_subplot()
        x = [t / unit for t in tokens]
        axes.plot(x, losses, color=theme.accent, alpha=0.35, linewidth=0.9, label="training, per step")
        axes.plot(x, _smooth(losses), color=theme.ink, linewidth=1.7, label="training, smoothed")
        seen = [row for row in rows if row.get("kind") == "eval" and row.get("heldout_loss") is not None]
        axes.plot(
            [row["tokens"] / unit for row in seen],
            [row["heldout_loss"] for row in seen],
            "o",
            color=theme.moba,
            markeredgecolor=theme.paper,
            markersize=6,
            clip_on=False,
            zorder=3,
            label="held out",
        )
        _stages(axes, train, unit, theme)
        axes.set_xlim(0, x[-1])
        axes.set_xlabel(f"tokens seen ({name})")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(loc="upper right")
        return png_of(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, each prefix weighted properly (no pull towards zero at the start)."""
    smoothed, total, weight = [], 0.0, 0.0
    newest = min(1.0, SMOOTHED / len(values))
    for value in values:
        total = total * (1 - newest) + value * newest
        weight = weight * (1 - newest) + newest
        smoothed.append(total / weight)
    return smoothed


def _stages(axes: Any, train: Sequence[Row], unit: float, theme: Theme) -> None:
    """A band and a label for every stage, a dashed line wherever the plan changes."""
    start = 0.0
    top = axes.get_xaxis_transform()  # x in data, y in shares of the axis
    for number, (stage, group) in enumerate(groupby(train, key=lambda row: row.get("stage", ""))):
        rows = list(group)
        end = rows[-1]["tokens"] / unit
        axes.axvspan(start, end, color=theme.bands[number % 2], zorder=0, linewidth=0)
        if number:
            axes.axvline(start, color=theme.faint, linewidth=1)
        label = f"{stage}\n{rows[0]['seq_len']:,} tokens" if "seq_len" in rows[0] else str(stage)
        axes.text(
            (start + end) / 2, 1.01, label, transform=top, ha="center", va="bottom", color=theme.ink, fontsize=9
        )
        before = start
        for change, (plan, part) in enumerate(groupby(rows, key=lambda row: row.get("plan", ""))):
            here = list(part)
            if change:
                axes.axvline(before, color=theme.faint, linewidth=1, linestyle=(0, (4, 3)))
            if plan:
                end_of_plan = here[-1]["tokens"] / unit
                middle = (before + end_of_plan) / 2
                short = str(plan).replace(", ", "\n")
                axes.text(
                    middle, 0.03, short, transform=top, ha="center", va="bottom", color=theme.faint, fontsize=8
                )
                before = end_of_plan
        start = end


def loss_by_position(loss: dict[str, Any], theme: Theme) -> bytes | None:
    """Position-wise loss of the plans with error bands and power laws; beside it their paired difference."""
    curves = {name: points for name, report in loss["plans"].items() if (points := loss_points(report))}
    if not curves:
        return None
    difference = loss_points(loss["difference"]) if loss.get("difference") else None
    panels = 2 if difference else 1
    with canvas(theme, 9.2, 3.9) as figure:
        left = figure.add_subplot(1, panels, 1)
        for name, (x, y, error) in curves.items():
            colour = theme.of(name)
            left.fill_between(
                x, _offset(y, error, -1), _offset(y, error, 1), color=colour, alpha=0.15, linewidth=0
            )
            width = 3.2 if name == "full" else 1.6  # curves that coincide stay visible
            left.plot(x, y, marker="o", markersize=3.5, color=colour, linewidth=width, label=name)
            law = loss.get("power_law", {}).get(name)
            if law:
                fitted = [law["offset"] + law["scale"] * p ** -law["exponent"] for p in x]
                left.plot(x, fitted, color=colour, linewidth=1, linestyle=":", label=f"{name}: {_law_text(law)}")
        left.set_title("Loss by position")
        left.set_xlabel("position in the document (tokens)")
        left.set_ylabel("loss (nats per token)")
        left.legend(loc="upper right", fontsize=8.5)
        if difference:
            right = figure.add_subplot(1, 2, 2)
            x, y, error = difference
            right.axhline(0, color=theme.faint, linewidth=1)
            right.fill_between(
                x, _offset(y, error, -1), _offset(y, error, 1), color=theme.moba, alpha=0.2, linewidth=0
            )
            right.plot(x, y, marker="o", markersize=3.5, color=theme.moba, linewidth=1.6)
            reach = 1.25 * max(abs(v) for v in [*_offset(y, error, -1), *_offset(y, error, 1), 1e-4])
            right.set_ylim(-reach, reach)
            right.set_title("MoBA minus full")
            right.set_xlabel("position in the document (tokens)")
            right.set_ylabel("difference (nats per token)")
        if loss.get("spacing") == "log":
            for axes in figure.axes:
                axes.set_xscale("log", base=2)
        return png_of(figure)


def loss_points(report: dict[str, Any]) -> tuple[list[float], list[float], list[float]] | None:
    """Middle, mean and standard error of each bucket that has tokens."""
    buckets = [b for b in report["buckets"] if b["estimate"]["tokens"]]
    if not buckets:
        return None
    return (
        [(b["start"] + b["end"]) / 2 for b in buckets],
        [b["estimate"]["loss"] for b in buckets],
        [b["estimate"]["stderr"] or 0.0 for b in buckets],
    )


def _offset(values: Sequence[float], errors: Sequence[float], sign: int) -> list[float]:
    return [v + sign * CONFIDENCE * e for v, e in zip(values, errors, strict=True)]


def _law_text(law: dict[str, float]) -> str:
    return f"{law['scale']:.2f} p^{-law['exponent']:.3f}"
