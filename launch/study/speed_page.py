"""What the study of speed shows: stored benchmarks and the run at a fixed share of blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.files import write_atomic
from launch.packages import ROOT
from launch.study.speed import FIXED, growth

ATTENTION, STEPS = ROOT / "benchmarks/results/attention-h200.json", ROOT / "benchmarks/results/step-h200.json"
LONG = 131_072  # tokens from which exponents are fitted
BUSY = 524_288  # the same where one head is timed, which takes as long as its launches below
Json = dict[str, Any]


def speed_parts(out: Path) -> list[str]:
    """Tables and pictures, as far as there are measurements."""
    parts: list[str] = []
    if (out / FIXED).is_file():
        parts += _fixed(json.loads((out / FIXED).read_text(encoding="utf-8")), out)
    if ATTENTION.is_file():
        parts += _attention(json.loads(ATTENTION.read_text(encoding="utf-8")))
    if STEPS.is_file():
        parts += _steps(json.loads(STEPS.read_text(encoding="utf-8")))
    return parts


def _fixed(report: Json, out: Path) -> list[str]:
    rows = report["rows"]
    lines = [
        "| tokens | blocks read | block | MoBA, ms | dense, ms | faster | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense, blocks = row["dense_fwd_ms"], row["seq_len"] // row["block_size"]
        what = f"{row['seq_len']:,} | {row['topk']} of {blocks} | {row['block_size']} | {row['fwd_ms']:.4g}"
        beside = f"{dense:.4g} | {dense / row['fwd_ms']:.2f} ×" if dense else "– | –"
        lines.append(f"| {what} | {beside} | {row['error']:.1e} |")
    _draw(rows, out / "fixed-share.png")
    return [
        f"**Fixed share of blocks**: forward pass of one head, head_dim 128, bf16, {report['gpu']}, commit "
        f"`{report['commit'][:7]}`, {report['date']}; dense is cuDNN in the same process; the error is that of "
        "sampled queries against fp32.",
        "\n".join(lines),
        _exponents(rows, "fwd_ms", "dense_fwd_ms", "at a fixed share of blocks", BUSY),
        "![time by length at a fixed share of blocks](fixed-share.png)",
    ]


def _attention(report: Json) -> list[str]:
    rows = [row for row in report["rows"] if row["head_dim"] == 128 and _plain(row)]
    texts = []
    for block, topk in sorted({(row["block_size"], row["topk"]) for row in rows}):
        own = [
            {
                **row,
                "a": row["fwd_bwd_ms"] / row["num_heads"],
                "b": (row["dense_fwd_bwd_ms"] or 0) / row["num_heads"],
            }
            for row in rows
            if (row["block_size"], row["topk"]) == (block, topk)
        ]
        if sum(row["seq_len"] >= LONG for row in own) >= 2:
            texts.append("- " + _exponents(own, "a", "b", f"blocks of {block}, topk {topk}"))
    return [
        f"**Fixed blocks**: `benchmarks/results/attention-h200.json` ({report['gpu']}, commit "
        f"`{report['commit'][:7]}`), forward and backward per query head.",
        "\n".join(texts),
        "![attention by length](../../../benchmarks/results/attention-h200.png)",
    ]


def _plain(row: Json) -> bool:
    """One document whose queries choose at random, as all rows once were."""
    return row.get("documents", 1) == 1 and row.get("routing", "uniform") == "uniform"


def _steps(report: Json) -> list[str]:
    lines = ["| tokens | attention | GPUs | seconds per step | tokens/s | commit |", "|---|---|---|---|---|---|"]
    for row in sorted(report["rows"], key=lambda row: (row["seq_len"], row["plan"])):
        seconds = row["seq_len"] / row["tokens_per_s"]
        commit = str(row.get("commit", report.get("commit", "")))[:7]
        what = f"{row['seq_len']:,} | {row['plan']} | {row.get('processes', 1)}"
        lines.append(f"| {what} | {seconds:.3g} | {row['tokens_per_s']:,.0f} | `{commit}` |")
    return ["**Whole steps**: `benchmarks/results/step-h200.json`, Llama-3.2-1B shape.", "\n".join(lines)]


def _exponents(rows: Sequence[Json], ours: str, dense: str, what: str, least: int = LONG) -> str:
    """Fitted growth of both from `least` tokens on."""
    long = [row for row in rows if row["seq_len"] >= least]
    text = f"{what}: MoBA's time grows with length to the power "
    text += f"{growth([row['seq_len'] for row in long], [row[ours] for row in long]):.2f}"
    both = [row for row in long if row[dense]]
    if len(both) >= 2:
        text += f", dense attention's {growth([r['seq_len'] for r in both], [r[dense] for r in both]):.2f}"
    return text + f" (from {least:,} tokens on)."


def _draw(rows: Sequence[Json], path: Path) -> None:
    from eval.plots import canvas, png_of
    from eval.style import LIGHT

    with canvas(LIGHT, 6.4, 4.2) as figure:
        axes = figure.add_subplot()
        axes.plot([r["seq_len"] for r in rows], [r["fwd_ms"] for r in rows], "o-", color=LIGHT.moba, label="MoBA")
        both = [r for r in rows if r["dense_fwd_ms"]]
        axes.plot([r["seq_len"] for r in both], [r["dense_fwd_ms"] for r in both], "*-", color=LIGHT.full,
                  label="dense (cuDNN)")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = [r["seq_len"] for r in rows]
        axes.set_xticks(lengths, [f"{n / 2**20:g}M" if n >= 1 << 20 else f"{n >> 10}K" for n in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("sequence length (tokens)")
        axes.set_ylabel("forward, one head (milliseconds)")
        axes.legend()
        write_atomic(path, png_of(figure))
