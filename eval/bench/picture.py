"""Time of attention by length, MoBA and dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.files import write_atomic
from eval.plots import canvas, png_of
from eval.style import LIGHT

Row = dict[str, Any]
_SHADES = ("o-", "s-", "^-", "d-")


def draw(report: dict[str, Any], path: Path) -> None:
    """Forward plus backward against sequence length, both logarithmic, one panel per head dimension."""
    rows: Sequence[Row] = [r for r in report["rows"] if (r["documents"], r["routing"]) == (1, "uniform")]
    dims = sorted({row["head_dim"] for row in rows}, reverse=True)
    with canvas(LIGHT, 5.2 * len(dims), 4.4) as figure:
        for number, dim in enumerate(dims):
            axes = figure.add_subplot(1, len(dims), number + 1)
            _panel(axes, [row for row in rows if row["head_dim"] == dim])
            axes.set_title(f"head_dim {dim}")
        figure.suptitle(f"attention, forward + backward, {report['gpu']}")
        write_atomic(path, png_of(figure))


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    """Time per query head, so that rows with fewer heads at long lengths lie on the same line."""
    dense = {r["seq_len"]: r["dense_fwd_bwd_ms"] / r["num_heads"] for r in rows if r["dense_fwd_bwd_ms"]}
    if dense:
        lengths = sorted(dense)
        axes.plot(lengths, [dense[n] for n in lengths], "*-", label="dense (cuDNN)", color=LIGHT.full)
    settings = sorted({(r["block_size"], r["topk"]) for r in rows}, reverse=True)
    for mark, (block, topk) in zip(_SHADES * len(settings), settings, strict=False):
        line = sorted((r["seq_len"], r["fwd_bwd_ms"] / r["num_heads"]) for r in rows if r["block_size"] == block
                      and r["topk"] == topk)  # fmt: skip
        axes.plot(*zip(*line, strict=True), mark, label=f"MoBA {block} x {topk}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({r["seq_len"] for r in rows})
    axes.set_xticks(lengths, [f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K" for n in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("milliseconds per query head")
    axes.grid(True, which="major", alpha=0.4)
    axes.legend(fontsize=8)
