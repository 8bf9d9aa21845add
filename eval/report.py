"""`report.html`: what came out of a run, on one page that can be sent alone.

It is made from files only (`metrics.jsonl`, `eval/*.json`, the run's configuration), so any suite that ran
before is in it, whenever it ran. PNG files of all pictures lie beside it in `plots/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.paths import RunPaths
from eval import page, plots, sections
from eval.files import write_atomic
from eval.gate import read_gates


def write_report(out: Path, run: Path | None) -> Path:
    """Draw the plots and write the page.

    Args:
        out: folder with `eval/*.json`; receives `plots/*.png` and `report.html`.
        run: the run folder, for the training curve and the configuration; None: `out` itself, if it is one.
    """
    paths, origin = RunPaths(out), RunPaths(run or out)
    loss, ruler, gate = (_read(paths.eval / f"{name}.json") for name in ("loss", "ruler", "gate"))
    gates = read_gates(paths.eval / "gate.npz", gate["layers"]) if gate else []
    metrics = plots.read_metrics(origin.metrics)
    found = [part["checkpoint"] for part in (loss, ruler, gate) if part]
    about: dict[str, Any] = found[0] if found else {}
    draw = sections.Pictures(paths.plots)
    content = page.page(
        about.get("name", out.name),
        sections.subtitle(about),
        sections.mixed(found),
        sections.summary(loss, ruler, gate, metrics),
        sections.training(metrics, draw),
        sections.losses(loss, draw),
        sections.ruler_scores(ruler, draw),
        sections.gate_choice(gate, gates, draw),
        sections.configuration(about, origin.config),
    )
    write_atomic(paths.report, content.encode())
    return paths.report


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
