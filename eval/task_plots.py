"""Heat maps of task scores by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.plots import canvas, png_of
from eval.style import Theme


def ruler_heatmap(ruler: dict[str, Any], theme: Theme) -> bytes | None:
    """Scores by task and length, one panel per plan; the last row is the mean over the tasks shown."""
    from matplotlib import colormaps

    plans = ruler["plans"]
    if not plans:
        return None
    first = next(iter(plans.values()))
    lengths, tasks = list(first["lengths"]), [*first["tasks"], "mean"]
    with canvas(theme, max(4.6, 1.6 + 0.95 * len(lengths)) * len(plans), 1.1 + 0.38 * len(tasks)) as figure:
        for number, (name, result) in enumerate(plans.items(), 1):
            axes = figure.add_subplot(1, len(plans), number)
            columns = [result["lengths"][length] for length in lengths]
            cells = [[c["mean"] if t == "mean" else c["scores"][t] for c in columns] for t in tasks]
            axes.imshow(cells, vmin=0, vmax=100, cmap=theme.cells, aspect="auto")
            for i, row in enumerate(cells):
                for j, value in enumerate(row):
                    dark = sum(colormaps[theme.cells](value / 100)[:3]) < 1.3
                    axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="#fff" if dark else "#111")
            axes.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
            axes.set_yticks(range(len(tasks)), tasks)
            axes.set_title(name)
            axes.set_xlabel("prompt length (tokens)")
            axes.grid(False)
        return png_of(figure)


def needle_heatmap(needle: dict[str, Any], theme: Theme) -> bytes | None:
    """Share of needles found by depth (down) and length (across), one panel per plan."""
    grids: dict[str, Sequence[Sequence[float]]] = needle["grids"]
    if not grids:
        return None
    lengths, depths = needle["lengths"], needle["depths"]
    width = max(4.2, 1.5 + 0.6 * len(lengths)) * len(grids)
    with canvas(theme, width, 1.4 + 0.26 * len(depths)) as figure:
        for number, (name, grid) in enumerate(grids.items(), 1):
            axes = figure.add_subplot(1, len(grids), number)
            image = axes.imshow(grid, vmin=0, vmax=100, cmap=theme.cells, aspect="auto")
            axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
            axes.set_title(name)
            axes.set_xlabel("prompt length (tokens)")
            if number == 1:
                axes.set_ylabel("depth of the needle")
            axes.grid(False)
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, pad=0.02)
        bar.set_ticks([0, 50, 100], labels=["0 %", "50 %", "100 %"])
        bar.set_label("found")
        bar.outline.set_visible(False)
        return png_of(figure)


def short_length(length: int) -> str:
    """1,048,576 as 1M, 131,072 as 128K; what is no round number as it is."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length:,}"
