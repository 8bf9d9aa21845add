"""Curves of several checkpoints in one picture."""

from __future__ import annotations

from typing import Any

from eval.plots import canvas, loss_points, png_of
from eval.style import Theme


def losses_by_position(losses: dict[str, dict[str, Any]], theme: Theme) -> bytes | None:
    """Position-wise loss by checkpoint (colour) and attention (line). None without full-length documents."""
    curves = [
        (number, f"{name}, {plan}", plan, points)
        for number, (name, loss) in enumerate(losses.items())
        for plan, report in loss["plans"].items()
        if (points := loss_points(report))
    ]
    if not curves:
        return None
    with canvas(theme, 9.2, 4.2) as figure:
        axes = figure.add_subplot()
        for number, label, plan, (x, y, _) in curves:
            colour = theme.series("viridis", number, len(losses))
            style = "-" if plan == "full" else "--"
            axes.plot(x, y, style, marker="o", markersize=3, color=colour, linewidth=1.7, label=label)
        if any(loss.get("spacing") == "log" for loss in losses.values()):
            axes.set_xscale("log", base=2)
        axes.set_xlabel("position in the document (tokens)")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(loc="upper right", fontsize=8.5)
        return png_of(figure)
