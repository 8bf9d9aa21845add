"""What is measured on a trained arm: losses by document and position, and tasks, through `eval`'s own parts.

Losses are kept document by document, so that arms can be compared on the same documents afterwards.

Shape legend: B position buckets.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.compose import compose
from conf.schema import EvalConfig
from data.batch import Batch
from data.loader import collate, long_documents
from data.packing import Pieces, build_row
from data.store import TokenStore
from eval.load import Loaded, compared_plans, find_source, load_source
from eval.loss import FIRST_BUCKET, MEAN, TRAILING, LossSums, sum_losses
from eval.suites import Evaluation
from eval.task_suites import needle_suite, ruler_suite
from launch.study.plan import LossAt
from model.schedule import describe
from model.shapes import num_parameters

Json = dict[str, Any]


def measure(
    run: Path,
    losses: Sequence[LossAt],
    tasks: Sequence[Sequence[str]],
    sets: dict[str, Path],
    keep: Callable[[Json], None] = lambda found: None,
) -> Json:
    """Load the newest checkpoint of `run` and measure it under full attention and its own MoBA, if any.

    Args:
        losses: with numbers in their text fields.
        tasks: overrides of `moba eval`, one list per suite.
        sets: prepared sets by the name that `LossAt.set` uses.
        keep: called with what there is after each measurement.
    """
    source = find_source(run)
    plans = compared_plans(source, EvalConfig().attention)
    loaded = load_source(source)
    found: Json = {
        "checkpoint": source.name,
        "parameters": num_parameters(source.config),
        "plans": {name: describe(plan) for name, plan in plans.items()},
        "losses": [],
        "tasks": [],
    }
    for at in losses:
        found["losses"].append(_losses(loaded, plans, at, sets[at.set]))
        keep(found)
    for overrides in tasks:
        found["tasks"].append(_tasks(loaded, _own(plans), list(overrides), run))
        keep(found)
    return found


def _own(plans: dict[str, Any]) -> dict[str, Any]:
    """The plan the arm ended its training with: MoBA where it had any."""
    name = list(plans)[-1]
    return {name: plans[name]}


def _losses(loaded: Loaded, plans: dict[str, Any], at: LossAt, folder: Path) -> Json:
    """Mean loss of every document, by plan: of its tokens, of the trailing ones, and in each bucket."""
    seq_len, trailing = int(at.seq_len), int(at.trailing)
    store = TokenStore(folder, "heldout")
    if at.whole:
        return _answers(loaded, plans, at, store)
    documents: list[Json] = []
    edges: tuple[int, ...] = ()
    for batch in long_documents(store, seq_len, seq_len * int(at.documents)):
        sums = sum_losses(
            loaded.model, [batch], plans,
            bucket=seq_len // at.buckets, trailing=trailing, seq_len=seq_len, device=loaded.device,
        )  # fmt: skip
        edges = next(iter(sums.values())).edges
        documents.append({name: _means(sums[name]) for name in plans})
    return {"seq_len": seq_len, "trailing": trailing, "set": at.set, "edges": edges, "documents": documents}


def _answers(loaded: Loaded, plans: dict[str, Any], at: LossAt, store: TokenStore) -> Json:
    """Mean loss over the targets of whole documents, which retrieval tasks have in their answers only, by plan."""
    seq_len = int(at.seq_len)
    documents = []
    for batch in whole_documents(store, seq_len, int(at.documents)):
        sums = sum_losses(loaded.model, [batch], plans, bucket=seq_len, trailing=0, device=loaded.device)
        lines = {name: sums[name].table.cpu()[MEAN] for name in plans}
        documents.append({name: {"loss": _ratio(line), "tokens": int(line[1])} for name, line in lines.items()})
    return {"seq_len": seq_len, "set": at.set, "whole": True, "documents": documents}


def whole_documents(store: TokenStore, seq_len: int, most: int) -> Iterator[Batch]:
    """One row a batch: a document of `seq_len` / 2 to `seq_len` tokens, evenly chosen, at most about `most`."""
    lengths = np.diff(store.offsets)
    fitting = np.flatnonzero((lengths > seq_len // 2) & (lengths <= seq_len))
    for doc in fitting[:: max(1, len(fitting) // most)]:
        pieces = Pieces(np.array([int(doc)]), np.zeros(1, np.int64), lengths[doc : doc + 1])
        yield replace(collate([build_row(store, pieces, seq_len)]), weights=None)


def _means(sums: LossSums) -> Json:
    """Nats and tokens of one document: [loss, tokens] of the whole, the trailing part and each bucket."""
    table = sums.table.cpu()
    buckets = table[FIRST_BUCKET:]
    whole = buckets.sum(0)
    return {
        "loss": _ratio(whole), "tokens": int(whole[1]), "trailing": _ratio(table[TRAILING]),
        "buckets": [_ratio(line) for line in buckets],
    }  # fmt: skip


def _ratio(line: torch.Tensor) -> float | None:
    return round(float(line[0] / line[1]), 6) if line[1] else None


def _tasks(loaded: Loaded, plans: dict[str, Any], overrides: list[str], run: Path) -> Json:
    """Scores of RULER tasks or of the needle grid, in percent. A failure is kept in their place."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = compose("eval", [f"checkpoint={run}", f"out={folder}", *overrides])
            evaluation = Evaluation(config, loaded, plans, None, loaded.source.seq_len)
            found = (needle_suite if config.suite == "needle" else ruler_suite)(evaluation)
    except Exception as error:  # whatever it is, it must not cost the arm
        traceback.print_exc()
        return {"suite": overrides[0], "error": f"{type(error).__name__}: {error}"}
    kept = ("depths", "lengths", "samples", "seed", "haystack", "grids", "benchmark", "plans", "decode")
    return {"suite": config.suite} | {key: found[key] for key in kept if key in found}
