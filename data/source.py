"""What row a stage sees at sample i: mixture of domains, epochs and shuffling, all by index arithmetic.

Nothing is counted up and nothing is drawn: sample i depends on (seed, stage, i) alone, so a resume at any
step, on any number of ranks, costs O(1) and gives the same rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.domains import rule_of
from conf.errors import UserError
from conf.schema import StageConfig
from data.packing import (
    PLANS,
    ConcatPacking,
    Documents,
    Packing,
    Pieces,
    Plan,
    PlannedPacking,
    Row,
    best_fit,
    build_row,
)
from data.shuffle import key_of, permute
from data.store import TokenStore
from data.view import View, cached, is_plain, long_rule, rule_key, select, table_key

_UNIT = 1 << 32  # weights are rounded to multiples of 1 / _UNIT: exact arithmetic, the same on every machine


class Mixture:
    """Which domain sample i comes from, and how many earlier samples came from it.

    Domains are spread evenly, not merely on average: among the first i samples, each of d domains has its share
    of i within 1 + ln(d) samples. Domains are taken out one after the other, largest first: sample n of what
    remains belongs to the domain if floor(n * share) grows at n.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights`: positive, of any sum. Order does not matter."""
        self.names = sorted(weights, key=lambda name: (-weights[name], name))
        total = sum(weights.values())
        units = {name: max(1, round(weights[name] / total * _UNIT)) for name in self.names}
        left = sum(units.values())
        self._shares: list[tuple[int, int]] = []  # of domain k among the domains k, k + 1, ...
        for name in self.names:
            self._shares.append((units[name], left))
            left -= units[name]

    def locate(self, i: int) -> tuple[str, int]:
        """(name of the domain of sample i, its number within the domain). O(number of domains)."""
        for name, (unit, left) in zip(self.names, self._shares, strict=True):
            before = i * unit // left
            if (i + 1) * unit // left > before:
                return name, before
            i -= before
        raise AssertionError("the last domain takes all that remains")


@dataclass(frozen=True)
class Place:
    """Where a sample is found: row `row` of epoch `epoch` of `domain`."""

    domain: str
    epoch: int
    row: int


class StageSource:
    """The rows of one stage, by sample number."""

    def __init__(self, stage: StageConfig, sets: Mapping[str, TokenStore], seed: int, name: str) -> None:
        """`name`: of the stage; stages with different names see different orders.

        Raises UserError if a domain has no set, a weight is not positive, the packing is unknown, or the sets
        were made with different tokenizers.
        """
        _check(stage, sets)
        self._seed, self._name = seed, name
        self.mixture = Mixture(stage.data.domains)
        self.seq_len = stage.seq_len
        self._rules = {domain: rule_of(stage.data, domain) for domain in stage.data.domains}
        self._sets = {domain: sets[domain] for domain in stage.data.domains}
        self.documents = {domain: _documents(stage, domain, store) for domain, store in self._sets.items()}
        self.packed = {
            domain: _packing(stage, domain, sets[domain], docs) for domain, docs in self.documents.items()
        }
        self.left_out = {
            domain: store.num_docs - docs.num_distinct if isinstance(docs, View) else 0
            for (domain, store), docs in zip(self._sets.items(), self.documents.values(), strict=True)
        }
        """Documents of each domain's set that its rule leaves out, or drops as longer than `seq_len`."""
        self.identity: dict[str, Any] = {
            "stage": name,
            "seed": seed,
            "seq_len": stage.seq_len,
            "global_batch": stage.global_batch,
            "packing": stage.data.packing,
            "weights": {domain: float(stage.data.domains[domain]) for domain in sorted(self._sets)},
            "sets": {domain: self._sets[domain].fingerprint for domain in sorted(self._sets)},
        }
        rules = {domain: rule_key(self._rules[domain]) for domain in sorted(self._sets)}
        if any(rules.values()):
            self.identity["rules"] = {domain: rule for domain, rule in rules.items() if rule}
        if stage.data.packing == "best_fit":
            self.identity |= {"window": stage.data.window, "plans": PLANS}
        """All that decides which tokens sample i has; equal identities give equal streams."""

    def locate(self, i: int) -> Place:
        """Where sample `i` comes from. O(number of domains), reads nothing."""
        domain, number = self.mixture.locate(i)
        epoch, place = self.packed[domain].find(number)
        key = key_of(self._seed, self._name, domain, epoch)
        return Place(domain, epoch, permute(place, self.packed[domain].rows_of(epoch), key))

    def pieces(self, i: int) -> tuple[str, Pieces]:
        """The domain of sample `i` and the pieces of its documents; reads no tokens. O(log documents + pieces)."""
        place = self.locate(i)
        turn = key_of(self._seed, self._name, place.domain, place.epoch, "first")
        return place.domain, self.packed[place.domain].pieces(place.row, place.epoch, turn)

    def row(self, i: int) -> Row:
        """Sample `i` of the stage."""
        return self.build(*self.pieces(i))

    def build(self, domain: str, pieces: Pieces) -> Row:
        """The row of these pieces of a domain's documents."""
        weight = self._rules[domain].loss_weight
        return build_row(self.documents[domain], pieces, self.seq_len, loss_weight=weight)

    def cost(self, i: int) -> int:
        """Attention cost of sample `i`: the sum of the squared lengths of its pieces."""
        _, pieces = self.pieces(i)
        return int((pieces.size * pieces.size).sum())


def _documents(stage: StageConfig, domain: str, store: TokenStore) -> Documents:
    """What the domain uses of its set."""
    rule = rule_of(stage.data, domain)
    if is_plain(rule, store.masked):
        return store
    key: dict[str, Any] = {"kind": "select", "rule": table_key(rule), "seq_len": stage.seq_len}
    where = f"data.rules.{domain} of the stage"
    lengths = np.diff(store.offsets)
    return View(store, cached(store, key, lambda: select(lengths, rule, stage.seq_len, store.masked, where)))


def _packing(stage: StageConfig, domain: str, store: TokenStore, documents: Documents) -> Packing:
    if stage.data.packing == "concat":
        return ConcatPacking(documents, stage.seq_len)
    rule, window = table_key(rule_of(stage.data, domain)), stage.data.window
    lengths, plans, left = np.diff(documents.offsets), list[Plan](), _samples(stage, domain)
    while left > 0 and len(plans) < PLANS:  # as many as the stage needs: a longer one has the same first ones
        key = {"kind": "best_fit", "rule": rule, "seq_len": stage.seq_len, "window": window, "epoch": len(plans)}
        build = functools.partial(best_fit, lengths, stage.seq_len, window, len(plans))
        plans.append(cached(store, key, build))
        left -= len(plans[-1]["row_starts"]) - 1
    return PlannedPacking(plans)


def _samples(stage: StageConfig, domain: str) -> int:
    """At least so many samples as the stage takes from the domain."""
    share = stage.data.domains[domain] / sum(stage.data.domains.values())
    slack = 2 + len(stage.data.domains)  # see `Mixture`
    return int(stage.tokens // stage.seq_len * share) + slack


def _check(stage: StageConfig, sets: Mapping[str, TokenStore]) -> None:
    domains = stage.data.domains
    if not domains:
        raise UserError("data.domains of the stage is empty; name at least one of data.sets with a weight")
    if stage.data.packing not in ("concat", "best_fit"):
        raise UserError(f"data.packing={stage.data.packing} is unknown; use concat or best_fit")
    for domain, weight in domains.items():
        if domain not in sets:
            known = ", ".join(sorted(sets)) or "none"
            raise UserError(f"data.domains.{domain}: no such set; data.sets has {known}")
        if not 0 < weight < float("inf"):
            raise UserError(f"data.domains.{domain}={weight}: must be positive; leave out what is not used")
        if sets[domain].masked:
            _check_masked(stage, domain)
    if len({sets[domain].tokenizer_fingerprint for domain in domains}) > 1:
        names = ", ".join(sorted(domains))
        raise UserError(f"data.sets {names} were made with different tokenizers; prepare them with one")


def _check_masked(stage: StageConfig, domain: str) -> None:
    """Answers are trained on whole or not at all."""
    if stage.data.packing == "concat":
        raise UserError(
            f"data.packing=concat would cut answers of domain {domain} and train on what is left: use "
            "data.packing=best_fit"
        )
    what = long_rule(rule_of(stage.data, domain), True)
    if what in ("split", "truncate"):
        raise UserError(f"data.rules.{domain}.long={what} would train on cut answers: use drop or error")
