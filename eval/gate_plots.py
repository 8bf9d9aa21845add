"""Pictures of the gate: which blocks are chosen, and what the choice is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.gate import LayerGate
from eval.plots import canvas, png_of
from eval.style import Theme

MAX_LAYERS = 4
MAX_HEADS = 4


def spread(number: int, most: int) -> list[int]:
    """At most `most` of 0..number-1, evenly spaced, first and last included."""
    if number <= most:
        return list(range(number))
    return sorted({round(i * (number - 1) / (most - 1)) for i in range(most)})


def gate_choices(layers: Sequence[LayerGate], theme: Theme) -> bytes | None:
    """Choice frequency by query block (down) and key block (across), for a few layers and heads.

    The first column is the mean over all heads. Logarithmic colours: a head that spreads its choices is as
    visible as one that does not.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    if not layers:
        return None
    rows = [layers[i] for i in spread(len(layers), MAX_LAYERS)]
    heads = spread(rows[0].choice.shape[0], MAX_HEADS)
    with canvas(theme, 1.9 * (len(heads) + 1) + 1.0, 1.62 * len(rows) + 0.75) as figure:
        grid = figure.subplots(len(rows), len(heads) + 1, squeeze=False, sharex=True, sharey=True)
        image: Any = None
        for line, gate in zip(grid, rows, strict=True):
            pictures = [("all heads", gate.choice.mean(0)), *((f"head {h}", gate.choice[h]) for h in heads)]
            for axes, (name, choice) in zip(line, pictures, strict=True):
                values = np.ma.masked_less_equal(choice.numpy(), 0)
                image = axes.imshow(values, norm=LogNorm(0.01, 1), cmap=theme.cells, interpolation="nearest")
                axes.set_facecolor(theme.bands[0])
                axes.grid(False)
                axes.set_title(name if gate is rows[0] else "", loc="center", fontsize=9, fontweight="normal")
            line[0].set_ylabel(f"layer {gate.layer}\nquery block")
        for axes in grid[-1]:
            axes.set_xlabel("key block")
        bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.01)
        bar.set_ticks([0.01, 0.1, 1], labels=["1 %", "10 %", "100 %"])
        bar.set_label("queries that read the block")
        bar.outline.set_visible(False)
        return png_of(figure)


def gate_value(layers: Sequence[LayerGate], theme: Theme) -> bytes | None:
    """Left: share of full attention's mass kept by the gate, by the best and by the nearest blocks, per layer.
    Right: how far back the chosen blocks lie."""
    import numpy as np

    measured = [gate for gate in layers if gate.queries]
    if not measured:
        return None
    with canvas(theme, 9.2, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        x = np.arange(len(measured))
        bars = (
            ("own block alone", "mass_own", theme.bar),
            ("nearest blocks", "mass_window", theme.faint),
            ("chosen by the gate", "mass_kept", theme.moba),
            ("best possible", "mass_best", theme.full),
        )
        for i, (label, field, colour) in enumerate(bars):
            means = [float(np.mean(getattr(gate, field))) for gate in measured]
            left.bar(x + (i - 1.5) * 0.2, means, 0.19, color=colour, label=label)
        left.set_xticks(x, [str(gate.layer) for gate in measured])
        left.set_ylim(0, 1.3)
        left.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        left.grid(axis="x", visible=False)
        left.set_xlabel("layer")
        left.set_title("Share of full attention's mass")
        left.legend(loc="upper left", ncols=2, fontsize=8.5)
        for i, gate in enumerate(measured):
            colour = theme.series("plasma", i, len(measured))
            name = f"layer {gate.layer}" if i in spread(len(measured), 6) else "_nolegend_"
            distance = range(1, len(gate.distance) + 1)
            right.plot(distance, gate.distance, marker=".", color=colour, label=name)
        right.set_xlabel("distance to the chosen block (blocks)")
        right.set_title("Share of choices by distance")
        right.set_ylim(bottom=0)
        right.legend(fontsize=8.5)
        return png_of(figure)
