"""Results of `moba bench step`: predictions beside measurements, one file over several calls, plot and table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.gpus import GIB, Gpu, gpu_named, gpu_of_device
from launch.plan_job import predict
from launch.plan_rates import measured_rates

if TYPE_CHECKING:
    from rich.console import Console

    from train.bench_cases import Case

Row = dict[str, Any]


def add_predictions(rows: Sequence[Row], cases: Sequence[Case], gpu: str) -> None:
    """Give each row the planner's peak and, where the GPU is known, tokens/s and MFU."""
    from train.bench_cases import STAGE, train_config

    for row, case in zip(rows, cases, strict=False):
        card = gpu_named(gpu) if gpu != "auto" else gpu_of_device(row["device"])
        parallel = case.config.mesh.sequence_parallel
        config = train_config(case, row["processes"] // parallel)
        memory, time = predict(config, STAGE, row["processes"], card, _rates(card), cuda=row["device"] != "cpu")
        row["predicted_bytes"] = memory.peak
        if time is not None:
            row["predicted_tokens_per_s"] = case.seq_len * row["processes"] // parallel / time.total
        if card is not None and "flops_per_s" in row:
            row["mfu"] = row["flops_per_s"] / card.flops


def _rates(card: Gpu | None) -> Any:
    return None if card is None else measured_rates(card)


def merged(path: Path, rows: Sequence[Row]) -> Row:
    """A report of `rows` and of the rows in the file at `path` that measured other configurations."""
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    fresh = {_identity(row) for row in rows}
    kept = [row for row in old if _identity(row) not in fresh]
    order = sorted([*kept, *rows], key=lambda row: (row["device"], row["processes"], row["seq_len"], row["case"]))
    return {"rows": order}


def _identity(row: Row) -> str:
    return json.dumps([row["device"], row["processes"], row["model"], row["case"], row["engine"], row["mesh"]])


def print_table(rows: Sequence[Row], out: Console) -> None:
    """One line a row, measured beside predicted."""
    from rich.table import Table

    table = Table(title=f"one optimizer step on {rows[0]['processes']} x {rows[0]['device']}")
    columns = ("tokens", "attention", "settings", "tokens/s", "predicted", "MFU", "peak GiB", "predicted", "error",
               "attn", "MLP+proj", "loss", "optim", "other")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in ("attention", "settings") else "right")
    for row in rows:
        table.add_row(*_cells(row))
    out.print(table)


def _cells(row: Row) -> list[str]:
    where = [f"{row['seq_len']:,}", row["plan"], _settings(row)]
    wanted, predicted = f"{row['predicted_bytes'] / GIB:.2f}", row.get("predicted_tokens_per_s")
    speed = f"{predicted:,.0f}" if predicted else "-"
    if "error" in row:
        verdict = "failed" if row["fits"] else "does not fit"
        return [*where, verdict, speed, "-", "-", wanted, "-", *["-"] * 5]
    error = f"{100 * (row['predicted_bytes'] / row['peak_bytes'] - 1):+.1f} %"
    mfu = f"{row['mfu']:.3f}" if "mfu" in row else "-"
    measured = [f"{row['tokens_per_s']:,.0f}", speed, mfu, f"{row['peak_bytes'] / GIB:.2f}", wanted, error]
    return [*where, *measured, *_shares(row)]


def _shares(row: Row) -> list[str]:
    spent = {part: sum(phases.values()) for part, phases in row.get("parts", {}).items()}
    total = sum(spent.values())
    if not total:
        return ["-"] * 5
    groups = [("attention",), ("mlp", "projections"), ("loss",), ("optimizer",)]
    shares = [sum(spent.get(part, 0.0) for part in group) / total for group in groups]
    return [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]


def _settings(row: Row) -> str:
    """What differs from the plainest engine, in few words."""
    engine, words = row["engine"], [f"z{row['engine']['zero_stage']}"]
    if engine["checkpointing"] != "none":
        words.append(engine["checkpointing"] + ("+offload" if engine["offload_checkpoints"] else ""))
    if engine["mlp_tile"]:
        words.append(f"tile {engine['mlp_tile']}")
    words += [name for name in ("offload_optimizer", "offload_param") if engine[name]]
    words += [engine["fused"]] if engine["fused"] != "none" else []
    parallel = row["mesh"]["sequence_parallel"]
    return " ".join([*words, *([f"sp{parallel}"] if parallel > 1 else [])])


def draw(report: Row, path: Path) -> None:
    """Tokens/s against sequence length, and the parts of each step, for every device in the report."""
    from eval.files import write_atomic
    from eval.plots import canvas, png_of
    from eval.style import LIGHT

    rows = [row for row in report["rows"] if "error" not in row]
    with canvas(LIGHT, 11.0, max(4.2, 1.5 + 0.34 * len(rows))) as figure:
        if rows:
            speed, parts = figure.subplots(1, 2)
            _draw_speed(speed, rows)
            _draw_parts(parts, [row for row in rows if row.get("parts")])
        figure.suptitle("one full training step, " + ", ".join(sorted({row["device"] for row in report["rows"]})))
        write_atomic(path, png_of(figure))


def _draw_speed(axes: Any, rows: Sequence[Row]) -> None:
    for name in sorted({(row["plan"], row["processes"]) for row in rows}):
        line = sorted((r["seq_len"], r["tokens_per_s"]) for r in rows if (r["plan"], r["processes"]) == name)
        label = name[0] + (f", {name[1]} processes" if name[1] > 1 else "")
        axes.plot(*zip(*line, strict=True), "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["seq_len"] for row in rows})
    axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
    axes.minorticks_off()
    low, high = min(row["tokens_per_s"] for row in rows), max(row["tokens_per_s"] for row in rows)
    ticks = [digit * 10**power for power in range(7) for digit in (1, 2, 3, 5)]
    ticks = [tick for tick in ticks if low / 1.5 < tick < high * 1.5]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=8)


def _draw_parts(axes: Any, rows: Sequence[Row]) -> None:
    """Share of each part in the step, one bar a row."""
    names = sorted({part for row in rows for part in row["parts"]})
    if not rows:
        return
    labels = [f"{row['seq_len']:,}  {row['plan']}" for row in rows]
    left = [0.0] * len(rows)
    for part in names:
        spent = [sum(row["parts"].get(part, {}).values()) / _total(row) for row in rows]
        axes.barh(range(len(rows)), spent, left=left, label=part)
        left = [a + b for a, b in zip(left, spent, strict=True)]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("share of the step's time")
    axes.grid(False)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.12))


def _total(row: Row) -> float:
    return sum(sum(phases.values()) for phases in row["parts"].values())
