"""The documents that a domain uses of its set, and tables made of them once and memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.schema import DomainRule
from data.folder import clear, exclusive_sibling, publish
from data.packing import Documents
from data.shuffle import hashes
from data.store import TokenStore

log = logging.getLogger(__name__)

PLANS_FOLDER = ".plans"  # in the folder of the set; may be deleted at any time
_VERSION = 3  # of the tables: raised when they would come out otherwise

Tables = dict[str, np.ndarray]


class View:
    """Documents of `store` in a chosen order: entry i is document `ids[i]`, as far as `offsets` reaches."""

    def __init__(self, store: Documents, tables: Tables) -> None:
        self._store = store
        self.ids: np.ndarray = tables["ids"]
        self.offsets: np.ndarray = tables["offsets"]
        self.num_docs, self.num_tokens = len(self.ids), int(self.offsets[-1])
        self.num_distinct = int(tables["distinct"][0])  # upsampled documents counted once

    def doc(self, i: int) -> np.ndarray:
        return self._store.doc(int(self.ids[i]))[: int(self.offsets[i + 1] - self.offsets[i])]

    def loss(self, i: int) -> np.ndarray | None:
        return self._store.loss(int(self.ids[i]))


def long_rule(rule: DomainRule, masked: bool) -> str:
    """What happens to documents above the sequence length: `rule.long`, resolved."""
    return ("drop" if masked else "split") if rule.long == "auto" else rule.long


def is_plain(rule: DomainRule, masked: bool) -> bool:
    """Whether the rule leaves the set as it is."""
    return not (rule.min_length or rule.max_length or rule.upsample) and long_rule(rule, masked) == "split"


def select(lengths: np.ndarray, rule: DomainRule, seq_len: int, masked: bool, where: str) -> Tables:
    """The table of a `View`.

    Repeats of upsampled documents lie in later rounds over the set, far from each other. A factor that is no
    whole number is reached by repeating a share of the documents, chosen by a hash of their number.

    Raises UserError if nothing is left, or a document is too long and `long` is error.
    """
    kept = lengths >= rule.min_length
    if rule.max_length:
        kept &= lengths <= rule.max_length
    above = kept & (lengths > seq_len)
    what = long_rule(rule, masked)
    if what == "error" and above.any():
        raise UserError(
            f"{where}: {int(above.sum())} documents are longer than seq_len={seq_len} (the longest has "
            f"{int(lengths[above].max())} tokens): prepare shorter ones, or set long=drop"
        )
    if what == "drop":
        kept &= ~above
    factor = np.zeros(len(lengths))
    factor[kept] = 1.0
    for least in sorted(rule.upsample):
        factor[kept & (lengths >= least)] = rule.upsample[least]
    whole = np.floor(factor)
    copies = (whole + (hashes(len(lengths)) / 2.0**64 < factor - whole)).astype(np.int64)
    rounds = [np.flatnonzero(copies > number) for number in range(int(copies.max(initial=0)))]
    if not rounds:
        raise UserError(f"{where} leaves none of {len(lengths)} documents: relax its lengths, or leave it out")
    ids = np.concatenate(rounds)
    used = np.minimum(lengths, seq_len) if what == "truncate" else lengths
    offsets = np.concatenate([[0], np.cumsum(used[ids])]).astype(np.int64)
    return {"ids": ids, "offsets": offsets, "distinct": np.array([np.count_nonzero(copies)])}


def rule_key(rule: DomainRule) -> dict[str, Any]:
    """What of a rule differs from the default, as plain JSON; `set` is not part of it."""
    default = asdict(DomainRule())
    changed = {k: v for k, v in asdict(rule).items() if v != default[k] and k != "set"}
    if "upsample" in changed:
        changed["upsample"] = {str(least): float(times) for least, times in sorted(rule.upsample.items())}
    return changed


def table_key(rule: DomainRule) -> dict[str, Any]:
    """As `rule_key`, of what decides which documents there are and in what order."""
    return {key: value for key, value in rule_key(rule).items() if key != "loss_weight"}


def cached(store: TokenStore, key: dict[str, Any], build: Callable[[], Tables]) -> Tables:
    """The tables that `build` makes of the content of `store` and `key`, kept beside the set and memory-mapped.

    One process builds, the others wait for it. Where the folder cannot be written, each keeps its own in memory.
    """
    parts = [_VERSION, store.fingerprint, key]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    folder = store.path / PLANS_FOLDER / name
    if not folder.is_dir():
        try:
            with exclusive_sibling(folder) as tmp:
                if not folder.is_dir():
                    clear(tmp)
                    for table, values in build().items():
                        np.save(tmp / f"{table}.npy", values, allow_pickle=False)
                    publish(tmp, folder)
        except OSError as error:
            log.warning("%s cannot be written (%s): its packing is kept in memory", folder.parent, error.strerror)
            return build()
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in _tables(folder)}


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"))
