"""`moba eval`: the same weights under full attention and under MoBA, side by side.

Writes `eval/loss.json`, `eval/ruler.json`, `eval/gate.json`, the plots and `report.html` into `out`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.paths import RunPaths
from conf.schema import EvalConfig
from data.store import TokenStore
from eval import tables
from eval.files import write_json
from eval.gate import save_gates
from eval.load import Loaded, Source, compared_plans, find_source, load_source
from eval.report import write_report
from eval.ruler.run import check_config
from eval.suites import Evaluation, gate_suite, loss_suite, ruler_suite

SUITES = {"all": ("loss", "ruler", "gate"), "loss": ("loss",), "ruler": ("ruler",), "gate": ("gate",)}


def run(config: EvalConfig) -> dict[str, Any]:
    """Run the suites, write everything, and return the results by suite.

    Raises:
        UserError: bad input; raised before any weights are read.
    """
    suites = SUITES[config.suite]
    source = find_source(Path(config.checkpoint))
    plans = compared_plans(source, config.attention)
    if "gate" in suites and "moba" not in plans:
        if config.suite == "gate":
            raise UserError(f"{source.path} has no MoBA layers: set attention.block_size and attention.topk")
        suites = tuple(suite for suite in suites if suite != "gate")
    seq_len = config.loss.seq_len or source.seq_len
    config.ruler.lengths = list(config.ruler.lengths) or [source.seq_len]
    if "ruler" in suites:
        check_config(config.ruler)
    store = _store(config, source) if {"loss", "gate"} & set(suites) else None
    loaded = load_source(source, config.device, config.attention.backend)
    _check_tokenizer(loaded, store)
    evaluation = Evaluation(config, loaded, plans, store, seq_len)

    results: dict[str, Any] = {}
    folder = RunPaths(Path(config.out)).eval
    for suite in suites:
        if suite == "gate":
            results[suite], gates = gate_suite(evaluation)
            save_gates(folder / "gate.npz", gates)
        else:
            results[suite] = {"loss": loss_suite, "ruler": ruler_suite}[suite](evaluation)
        write_json(folder / f"{suite}.json", results[suite])
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
