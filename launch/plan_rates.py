"""Measured rates for the planner, from the results in benchmarks/results.

Attention comes from `moba bench attention`; products of the blocks, loss and optimizer from the timed parts of
`moba bench step`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from conf.gpus import Gpu, gpu_of_device
from conf.schema import EngineConfig, ModelConfig
from launch.packages import ROOT
from model.flops import attended_pairs
from model.memory import Job
from model.schedule import FULL, LayerPlan
from model.step_time import AttentionRate, Rates, block_flops, loss_flops

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def measured_rates(gpu: Gpu, folder: Path = RESULTS) -> Rates:
    """What was measured on `gpu`; typical values for the rest, and where nothing was."""
    points: list[AttentionRate] = []
    used: list[str] = []
    rates = Rates()
    for path in sorted(folder.glob("attention-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if gpu_of_device(report.get("gpu", "")) == gpu:
            points += [point for row in report["rows"] for point in _points(row)]
            used.append(path.name)
    rows = []
    for path in sorted(folder.glob("step-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        found = [row for row in report["rows"] if gpu_of_device(row["device"]) == gpu and row.get("parts")]
        rows += found
        used += [path.name] if found else []
    if rows:
        rates = _with_steps(rates, rows, gpu)
    return replace(rates, attention=tuple(points), sources=(*used, "typical values for the rest"))


def _with_steps(rates: Rates, rows: list[Row], gpu: Gpu) -> Rates:
    """Shares of the peak in the blocks' products and in both kinds of loss: medians over the measured steps."""
    blocks: list[float] = []
    losses: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        job = job_of_row(row)
        spent = {part: sum(phases.values()) for part, phases in row["parts"].items()}
        blocks.append(block_flops(job) / (spent["projections"] + spent["mlp"]))
        losses[job.fused_loss].append(loss_flops(job) / spent["loss"])
    fused, tiled = (median(losses[kind]) / gpu.flops if losses[kind] else None for kind in (True, False))
    return replace(
        rates, matmul=median(blocks) / gpu.flops, loss=fused or rates.loss, tiled_loss=tiled or rates.tiled_loss
    )


def job_of_row(row: Row, plans: tuple[LayerPlan, ...] = ()) -> Job:
    """What a row measured; without plans, as far as its products go."""
    parallel = row["mesh"]["sequence_parallel"]
    # Rows from before there was a choice had the tiled loss.
    model, engine = ModelConfig(**row["model"]), EngineConfig(**{"loss": "tiled", **row["engine"]})
    return Job(model, plans, row["seq_len"], engine, world=row["processes"], parallel=parallel)


def _points(row: Row) -> list[AttentionRate]:
    """MoBA and dense attention of one row of `moba bench attention`."""
    plan = LayerPlan("moba", row["block_size"], row["topk"])
    points = [_point(row, plan, row["fwd_ms"], row["fwd_bwd_ms"])]
    if row.get("dense_fwd_bwd_ms"):
        points.append(_point(row, FULL, row["dense_fwd_ms"], row["dense_fwd_bwd_ms"]))
    return points


def _point(row: Row, plan: LayerPlan, forward_ms: float, both_ms: float) -> AttentionRate:
    work = 4.0 * row["head_dim"] * row["num_heads"] * attended_pairs(row["seq_len"], plan)
    backward_ms = both_ms - forward_ms
    return AttentionRate(
        row["head_dim"], plan.block_size, row["seq_len"], work / forward_ms * 1e3, 2 * work / backward_ms * 1e3
    )
