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
from eval.group import serve
from eval.load import Loaded, Source, compared_plans, find_source, load_source
from eval.report import write_report
from eval.ruler.official import found_lengths
from eval.ruler.run import check_config
from eval.ruler.texts import Texts
from eval.suites import Evaluation, Plans, gate_suite, loss_suite
from eval.task_suites import harness_suite, needle_suite, ruler_suite
from model.execution import PLAIN, Execution
from model.parallel_generation import check_parallel

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


def run(config: EvalConfig, execution: Execution = PLAIN) -> dict[str, Any]:
    """Run the suites, write everything, and return the results by suite (with several checkpoints: by folder).

    Args:
        execution: of the first of several processes (`eval.group`); the others run `follow`.

    Raises:
        UserError: bad input; raised before any weights are read.
    """
    out = Path(config.out)
    if config.suite == "report":
        return _report_only([Path(path) for path in _paths(config)], out)
    works = prepare(config)
    if not _several(config):
        return _evaluate(works[0], execution)
    results = {Path(work.config.out).name: _evaluate(work, execution) for work in works}
    report = write_comparison(out, [Path(work.config.out) for work in works])
    tables.say(f"comparison: {report}")
    return results


def follow(config: EvalConfig, execution: Execution) -> None:
    """What every process but the first does while that one runs `run`."""
    for work in prepare(config):
        loaded = load_source(work.source, config.device, config.attention.backend, execution=execution)
        assert loaded.group is not None
        serve(loaded.group.model)


def prepare(config: EvalConfig) -> list[Work]:
    """Look at everything the suites will need, for each checkpoint. Writes nothing.

    Raises:
        UserError: bad input.
    """
    paths, out = _paths(config), Path(config.out)
    if not _several(config):
        return [_prepare(config, paths[0], out)]
    folders = [out / f"{number}-{_slug(path)}" for number, path in enumerate(paths, 1)]
    return [_prepare(config, path, folder) for path, folder in zip(paths, folders, strict=True)]


def _paths(config: EvalConfig) -> list[str]:
    paths = [str(path) for path in config.checkpoint] if _several(config) else [str(config.checkpoint)]
    if not paths:
        raise UserError("checkpoint=[] names nothing to evaluate")
    return paths


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
    """One checkpoint's part of `prepare`."""
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
    if config.sequence_parallel > 1:
        check_parallel(source.config, config.sequence_parallel)
        seq_len = config.loss.seq_len or source.seq_len
        if "loss" in suites and seq_len % config.sequence_parallel:
            raise UserError(
                f"loss.seq_len={seq_len}: not a multiple of sequence_parallel={config.sequence_parallel}"
            )
    store = _store(config, source) if {"loss", "gate"} & set(suites) else None
    return Work(config, source, plans, suites, store)


def _evaluate(work: Work, execution: Execution) -> dict[str, Any]:
    config, source = work.config, work.source
    loaded = load_source(source, config.device, config.attention.backend, execution=execution)
    results = _run_suites(work, loaded)
    if loaded.group is not None:  # after a failure the others are not told: they may wait inside a collective
        loaded.group.stop()
    return results


def _run_suites(work: Work, loaded: Loaded) -> dict[str, Any]:
    config, source = work.config, work.source
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
