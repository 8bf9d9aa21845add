"""`moba eval`: the same weights under full attention and under MoBA, side by side; one checkpoint or several.

Writes `eval/*.json`, the plots and `report.html` into `out`. With several checkpoints each has a folder of its own
in `out`, and the report compares them.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.paths import RunPaths
from conf.schema import EvalConfig
from data.store import TokenStore
from eval import harness, tables
from eval.compare import write_comparison
from eval.files import write_json
from eval.gate import save_gates
from eval.load import Loaded, Source, compared_plans, find_source, load_source
from eval.report import write_report
from eval.ruler.official import found_lengths
from eval.ruler.run import check_config
from eval.ruler.texts import Texts
from eval.suites import Evaluation, Plans, gate_suite, loss_suite
from eval.task_suites import harness_suite, needle_suite, ruler_suite

ALL = ("loss", "ruler", "gate")
RUNNERS = {"loss": loss_suite, "ruler": ruler_suite, "needle": needle_suite, "lm_eval": harness_suite}


@dataclass(frozen=True)
class Work:
    """One checkpoint with everything checked, before its weights are read."""

    config: EvalConfig
    source: Source
    plans: Plans
    suites: tuple[str, ...]
    store: TokenStore | None


def run(config: EvalConfig) -> dict[str, Any]:
    """Run the suites, write everything, and return the results by suite (with several checkpoints: by folder).

    Raises:
        UserError: bad input; raised before any weights are read.
    """
    paths = [str(path) for path in config.checkpoint] if _several(config) else [str(config.checkpoint)]
    out = Path(config.out)
    if not paths:
        raise UserError("checkpoint=[] names nothing to evaluate")
    if config.suite == "report":
        return _report_only([Path(path) for path in paths], out)
    if not _several(config):
        return _evaluate(_prepare(config, paths[0], out))
    folders = [out / f"{number}-{_slug(path)}" for number, path in enumerate(paths, 1)]
    works = [_prepare(config, path, folder) for path, folder in zip(paths, folders, strict=True)]
    results = {folder.name: _evaluate(work) for folder, work in zip(folders, works, strict=True)}
    report = write_comparison(out, folders)
    tables.say(f"comparison: {report}")
    return results


def _several(config: EvalConfig) -> bool:
    return not isinstance(config.checkpoint, str)


def _slug(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(Path(path).resolve().parts[-2:])).strip("-")


def _report_only(folders: list[Path], out: Path) -> dict[str, Any]:
    """Pages from results that are there: of one folder, or a comparison of several."""
    for folder in folders:
        if not list(RunPaths(folder).eval.glob("*.json")):
            raise UserError(f"checkpoint={folder}: suite=report takes `out` folders of earlier evaluations")
    one = len(folders) == 1 and folders[0].resolve() == out.resolve()
    report = write_report(out, None) if one else write_comparison(out, folders)
    tables.say(f"report: {report}")
    return {}


def _prepare(config: EvalConfig, path: str, out: Path) -> Work:
    """Look at everything the suites will need."""
    config = copy.deepcopy(config)
    config.checkpoint, config.out = path, str(out)
    suites = ALL if config.suite == "all" else (config.suite,)
    source = find_source(Path(path))
    plans = compared_plans(source, config.attention)
    ruler, needle = config.ruler, config.needle
    if "ruler" in suites:
        ruler.lengths = list(ruler.lengths) or (found_lengths(Path(ruler.prompts)) if ruler.prompts else [])
        ruler.lengths = ruler.lengths or [source.seq_len]
        check_config(ruler)
    if "needle" in suites:
        needle.lengths = sorted(needle.lengths or {source.seq_len >> shift for shift in range(4)})
        if Texts(ruler.data).data:
            _ = Texts(ruler.data).essays
    if "lm_eval" in suites:
        harness.task_shots(config.lm_eval.preset, config.tasks, config.lm_eval.shots)
        harness.require_harness()
    store = _store(config, source) if {"loss", "gate"} & set(suites) else None
    return Work(config, source, plans, suites, store)


def _evaluate(work: Work) -> dict[str, Any]:
    config, source = work.config, work.source
    loaded = load_source(source, config.device, config.attention.backend)
    _check_tokenizer(loaded, work.store)
    evaluation = Evaluation(config, loaded, work.plans, work.store, config.loss.seq_len or source.seq_len)
    results: dict[str, Any] = {}
    folder = RunPaths(Path(config.out)).eval
    for suite in work.suites:
        if suite == "gate":
            results[suite], gates = gate_suite(evaluation)
            save_gates(folder / "gate.npz", gates)
        else:
            results[suite] = RUNNERS[suite](evaluation)
        write_json(folder / f"{results[suite].get('benchmark', suite)}.json", results[suite])
        tables.show(suite, results[suite])
    report = write_report(Path(config.out), source.run)
    tables.say(f"report: {report}")
    return results


def _store(config: EvalConfig, source: Source) -> TokenStore:
    if config.dataset:
        return TokenStore(Path(config.dataset), "heldout")
    if not source.data:
        raise UserError(
            f"{source.path} does not say what it was trained on: set dataset=FOLDER made by `moba prepare`"
        )
    return TokenStore(source.data[0][1], "heldout")


def _check_tokenizer(loaded: Loaded, store: TokenStore | None) -> None:
    if store is not None and store.tokenizer_fingerprint != loaded.tokenizer.fingerprint:
        raise UserError(f"data {store.path} was tokenised with another tokenizer than {loaded.source.path} has")
