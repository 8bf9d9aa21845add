"""Table and picture of `moba bench generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.files import write_atomic
from eval.plots import canvas, png_of
from eval.style import LIGHT

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]


def line_of(row: Row) -> str:
    """One row as it is measured."""
    text = f"{row['length']:,} tokens: prefill MoBA {row['moba_prefill_s']:.3g} s, {row['speedup']:.2f}x faster"
    if "decode_full_ms" in row:
        step = row.get("decode_full_graph_ms", row["decode_full_ms"])
        text += f"; decode {step:.3g} ms, attention {row['decode_full_attention_us']:.3g} us a layer"
    return text


def print_table(report: Row, out: Console) -> None:
    """One line a length. A sum instead of a measurement has a mark."""
    from rich.table import Table

    table = Table(title=f"{report['model']['num_layers']} layers on {report['gpu']}, MoBA {_plan(report)}")
    columns = ("tokens", "prefill MoBA s", "full s", "faster", "attention MoBA s", "full s", "step ms", "graph ms",
               "attention us", "of bandwidth", "MoBA step ms", "graph ms", "attention us")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right")
    for row in report["rows"]:
        mark = "*" if row["speedup_is_of_sum"] else ""
        full = row.get("full_prefill_s", row["full_prefill_sum_s"])
        cells = [f"{row['length']:,}", f"{row['moba_prefill_s']:.3g}", f"{full:.3g}{mark}"]
        cells += [
            f"{row['speedup']:.2f}x{mark}",
            f"{row['moba_attention_s']:.3g}",
            f"{row['full_attention_s']:.3g}",
        ]
        if "decode_full_ms" in row:
            share = row.get("decode_bandwidth_share")
            cells += [*_decoded(row, "full"), f"{share:.0%}" if share is not None else "-", *_decoded(row, "moba")]
        table.add_row(*cells, *["-"] * (len(columns) - len(cells)))
    out.print(table)
    if any(row["speedup_is_of_sum"] for row in report["rows"]):
        layers = report["model"]["num_layers"]
        out.print(
            f"* not run: MoBA's prefill with its attention exchanged for full attention's, measured in one layer "
            f"over all chunks, times {layers}"
        )


def _decoded(row: Row, name: str) -> list[str]:
    """Step and captured step in ms, attention in us."""
    times = [row.get(f"decode_{name}_{what}") for what in ("ms", "graph_ms", "attention_us")]
    return ["-" if time is None else f"{time:.3g}" for time in times]


def _plan(report: Row) -> str:
    return f"{report['block_size']} x {report['topk']}"


def draw(report: Row, path: Path) -> None:
    """Prefill time by length, and the decode attention's bandwidth where there is a known one."""
    rows = report["rows"]
    lengths = [row["length"] for row in rows]
    with canvas(LIGHT, 10.4, 4.4) as figure:
        prefill, decode = figure.subplots(1, 2)
        full = [row.get("full_prefill_s", row["full_prefill_sum_s"]) for row in rows]
        prefill.plot(lengths, full, "*-", label="full attention", color=LIGHT.full)
        prefill.plot(lengths, [row["moba_prefill_s"] for row in rows], "o-", label=f"MoBA {_plan(report)}",
                     color=LIGHT.moba)  # fmt: skip
        summed = [(n, s) for n, s, row in zip(lengths, full, rows, strict=True) if row["speedup_is_of_sum"]]
        if summed:
            prefill.plot(*zip(*summed, strict=True), "o", fillstyle="none", markersize=13, color=LIGHT.full,
                         label="sum of measured parts")  # fmt: skip
        prefill.set_ylabel("prefill of the whole model (s)")
        prefill.set_yscale("log")
        prefill.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        steps = [row for row in rows if "decode_full_ms" in row]
        at = [row["length"] for row in steps]
        decode.plot(at, [row["decode_full_ms"] for row in steps], "s-", label="launch by launch", color=LIGHT.full)
        for name, label, mark in (("full", "captured graph", "*-"), ("moba", "MoBA, captured", "o-")):
            key, color = f"decode_{name}_graph_ms", LIGHT.full if name == "full" else LIGHT.moba
            captured = [(row["length"], row[key]) for row in steps if key in row]
            if captured:
                decode.plot(*zip(*captured, strict=True), mark, label=label, color=color)
        layers = report["model"]["num_layers"]
        attention = [row["decode_full_attention_us"] * layers / 1e3 for row in steps]
        decode.plot(at, attention, "^--", label="of it attention", color=LIGHT.accent)
        for row, time in zip(steps, attention, strict=True):
            if "decode_bandwidth_share" in row:
                decode.annotate(f"{row['decode_bandwidth_share']:.0%}", (row["length"], time),
                                textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)  # fmt: skip
        decode.set_ylabel("one decode step (ms)")
        decode.set_ylim(bottom=0)
        for axes, ticks in ((prefill, lengths), (decode, at)):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [_short(n) for n in ticks])
            axes.minorticks_off()
            axes.set_xlabel("prompt (tokens)")
            axes.legend(fontsize=8)
        shares = (
            ", % of memory bandwidth in attention" if any("decode_bandwidth_share" in r for r in steps) else ""
        )
        figure.suptitle(f"generation, {report['gpu']}{shares}")
        write_atomic(path, png_of(figure))


def _short(tokens: int) -> str:
    if tokens >= 1 << 20:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}K" if tokens >= 1 << 10 else str(tokens)
