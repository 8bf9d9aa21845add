"""`report.html`: what came out of a run, on one page that can be sent alone.

It is made from files only (`metrics.jsonl`, `eval/*.json`, the run's configuration), so any suite that ran
before is in it, whenever it ran. PNG files of all pictures lie beside it in `plots/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.paths import RunPaths
from eval import page, plots, sections, task_sections
from eval.files import write_atomic
from eval.gate import read_gates
from eval.pictures import Pictures


def write_report(out: Path, run: Path | None) -> Path:
    """Draw the plots and write the page.

    Args:
        out: folder with `eval/*.json`; receives `plots/*.png` and `report.html`.
        run: the run folder, for the training curve and the configuration; None: `out` itself, if it is one.
    """
    paths, origin = RunPaths(out), RunPaths(run or out)
    names = ("loss", "ruler", "ruler-local", "needle", "gate", "lm_eval")
    loss, ruler, local, needle, gate, harness = (read_result(out, name) for name in names)
    gates = read_gates(paths.eval / "gate.npz", gate["layers"]) if gate else []
    metrics = plots.read_metrics(origin.metrics)
    found = [part["checkpoint"] for part in (loss, ruler, local, needle, gate, harness) if part]
    about: dict[str, Any] = found[0] if found else {}
    draw = Pictures(paths.plots)
    content = page.page(
        about.get("name", out.name),
        sections.subtitle(about),
        sections.mixed(found),
        sections.summary(loss, ruler, gate, metrics),
        sections.training(metrics, draw),
        sections.losses(loss, draw),
        task_sections.ruler_scores(ruler, draw),
        task_sections.ruler_scores(local, draw),
        task_sections.needle_grid(needle, draw),
        task_sections.harness_scores(harness),
        sections.gate_choice(gate, gates, draw),
        sections.configuration(about, origin.config),
    )
    write_atomic(paths.report, content.encode())
    return paths.report


def read_result(out: Path, suite: str) -> dict[str, Any] | None:
    """What a suite wrote into the output folder `out`; None if it never ran."""
    path = RunPaths(out).eval / f"{suite}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
