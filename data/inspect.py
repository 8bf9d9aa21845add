"""A stage's mixture as it will be trained, counted from the rows themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from conf.constants import IGNORE_INDEX
from conf.domains import rule_of
from conf.schema import StageConfig
from data.balance import deal
from data.shuffle import key_of, permute
from data.source import StageSource
from data.store import TokenStore

MAX_ROWS = 2048  # more rows than that are sampled
MASKED_ROWS = 32  # rows of a masked domain whose tokens are read, to count targets
BALANCE_STEPS = 8  # steps for which the ranks' attention costs are compared


@dataclass
class DomainReport:
    """One domain. `tokens` and `padding` are of the rows looked at; `by_length` maps a power of two n to tokens in
    documents of more than n / 2 and at most n tokens; `epochs` is how often the stage sees each of its rows.
    `targets`: share of the tokens that carry loss; `weight`: mean weight of these."""

    documents: int
    left_out: int
    epochs: float
    targets: float
    weight: float
    rows: int = 0
    tokens: int = 0
    padding: int = 0
    cut: int = 0  # tokens in pieces of split documents
    by_length: Counter[int] = field(default_factory=Counter)


@dataclass
class StageReport:
    """`rows` of `total_rows` were looked at. `imbalance` in order, and dealt out: how much longer the slowest rank
    computes attention than the average one."""

    domains: dict[str, DomainReport]
    rows: int
    total_rows: int
    seq_len: int
    imbalance: tuple[float, float]

    @property
    def padding(self) -> float:
        """Share of all places in rows that hold no token."""
        return sum(one.padding for one in self.domains.values()) / (self.rows * self.seq_len)


def inspect(
    stage: StageConfig, sets: Mapping[str, TokenStore], seed: int, name: str, dp_world: int = 1
) -> StageReport:
    """Look at the rows of a stage: all, or MAX_ROWS drawn evenly. `sets` by domain, as for `TrainLoader`."""
    source = StageSource(stage, sets, seed, name)
    total = stage.tokens // stage.seq_len
    rows = min(total, MAX_ROWS)
    share = {domain: weight / sum(stage.data.domains.values()) for domain, weight in stage.data.domains.items()}
    domains = {
        domain: DomainReport(
            documents=documents.num_docs,
            left_out=source.left_out[domain],
            epochs=share[domain] * total / source.packed[domain].rows_of(0),
            targets=1.0,
            weight=rule_of(stage.data, domain).loss_weight,
        )
        for domain, documents in source.documents.items()
    }
    for domain, report in domains.items():
        if sets[domain].masked or sets[domain].weighted:
            report.targets, report.weight = _targets(source, domain)
    for number in range(rows):
        sample = number if rows == total else permute(number, total, key_of("inspect", seed, name))
        domain, pieces = source.pieces(sample)
        report, offsets = domains[domain], source.documents[domain].offsets
        lengths = offsets[pieces.doc + 1] - offsets[pieces.doc]
        report.rows += 1
        report.tokens += int(pieces.size.sum())
        report.padding += stage.seq_len - int(pieces.size.sum())
        report.cut += int(pieces.size[pieces.size < lengths].sum())
        for power, size in zip(np.frexp(lengths - 0.5)[1].tolist(), pieces.size.tolist(), strict=True):
            report.by_length[1 << power] += size
    return StageReport(domains, rows, total, stage.seq_len, _imbalance(source, stage, dp_world))


def _targets(source: StageSource, domain: str) -> tuple[float, float]:
    """(share of the tokens that carry loss, mean weight of these), over the first rows of a domain."""
    packed, valid, tokens, weight = source.packed[domain], 0, 0, 0.0
    for index in range(min(packed.rows_of(0), MASKED_ROWS)):
        pieces = packed.pieces(index, 0, 0)
        row = source.build(domain, pieces)
        own = int((row.labels != IGNORE_INDEX).sum())
        valid += own
        tokens += int(pieces.size.sum())
        weight += own if row.weights is None else float(row.weights.sum())
    return valid / max(tokens, 1), weight / max(valid, 1)


def _imbalance(source: StageSource, stage: StageConfig, world: int) -> tuple[float, float]:
    """(slowest rank / mean rank - 1) of attention cost, over a few steps: in the order of samples, and dealt."""
    worst = np.zeros(2)
    steps = min(BALANCE_STEPS, stage.tokens // (stage.seq_len * stage.global_batch))
    for step in range(steps):
        first = step * stage.global_batch
        costs = np.array([source.cost(first + i) for i in range(stage.global_batch)])
        dealt = deal(costs.tolist(), world, stage.micro_batch)
        orders = np.arange(len(costs)).reshape(world, -1), np.array(dealt)
        for kind, order in enumerate(orders):
            ranks = costs[order].sum(axis=1)
            worst[kind] += ranks.max() / ranks.mean() - 1
    in_order, balanced = (worst / max(steps, 1)).tolist()
    return in_order, balanced
