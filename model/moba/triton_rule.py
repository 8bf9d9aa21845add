"""Which exact path runs on a shape: routed, union or dense. All three compute the same result.

The routed path costs what is selected plus lists and partial results; the union path costs about what dense
attention costs in the same kernels, whatever is selected. So the density decides: selected (query, key) pairs over
all causal pairs. From which density on the union path is faster was measured per block size and length and is
stored in triton_rule.json; `moba bench attention rule=true` prints it and measures it anew. Nothing is timed when
training starts, and a shape far from every measured one takes the routed path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypedDict

RULE_FILE = Path(__file__).with_name("triton_rule.json")
UNION_MAX_PAST = 256  # past blocks of a query; beyond this the union path refuses (see triton_membership)
MARGIN = 0.98  # the union path must be this much faster to be taken
_LENGTH_FACTOR, _BLOCK_FACTOR = 4.0, 2.0  # how far from a measured shape the rule still applies

PathName = Literal["routed", "union", "dense"]


class Row(TypedDict):
    """One measurement: milliseconds of forward and backward, the choice of blocks not included."""

    seq_len: int
    documents: int
    head_dim: int
    block_size: int
    topk: int
    density: float
    routed_ms: float
    union_ms: float
    dense_ms: float | None


@dataclass(frozen=True)
class Threshold:
    """From `density` on the union path won on this shape; None: at no measured density.

    `seq_len` is the mean document length; `packed`: more than one document.
    """

    head_dim: int
    block_size: int
    seq_len: int
    packed: bool
    density: float | None


@dataclass(frozen=True)
class Rule:
    """The stored rule. `origin` names GPU, date and commit of the measurement, or says that there is none."""

    origin: str
    thresholds: tuple[Threshold, ...]


@dataclass(frozen=True)
class Choice:
    """A path and one line that says why."""

    path: PathName
    reason: str


def density(seq_len: int, block_size: int, topk: int) -> float:
    """Selected (query, key) pairs over causal pairs of one document in which no query leaves a slot empty."""
    full, rest = divmod(seq_len, block_size)
    own = full * block_size * (block_size + 1) // 2 + rest * (rest + 1) // 2
    few = min(topk - 1, full)
    past = block_size * (few * (few - 1) // 2 + (full - few) * few) + rest * few  # full blocks, then the rest
    return (own + past * block_size) / (seq_len * (seq_len + 1) // 2)


def thresholds(rows: Sequence[Row]) -> list[Threshold]:
    """Per shape the smallest measured density from which on the union path won every measurement."""
    groups: dict[tuple[int, int, int, bool], list[Row]] = {}
    for row in rows:
        key = (row["head_dim"], row["block_size"], row["seq_len"] // row["documents"], row["documents"] > 1)
        groups.setdefault(key, []).append(row)
    found = []
    for key, group in sorted(groups.items()):
        start = None
        for row in sorted(group, key=lambda r: r["density"], reverse=True):
            if row["union_ms"] > MARGIN * row["routed_ms"]:
                break
            start = row["density"]
        found.append(Threshold(*key, density=start))
    return found


def read_rule(path: Path) -> Rule:
    """The rule in a JSON file as `moba bench attention rule=true` writes it."""
    stored: dict[str, Any] = json.loads(path.read_text())
    if stored["source"] != "measured":
        return Rule("not measured", ())
    origin = f"{stored['gpu']}, {stored['date']}, commit {stored['commit'][:8]}"
    return Rule(origin, tuple(Threshold(**entry) for entry in stored["union_from"]))


@cache
def stored_rule() -> Rule:
    """The rule of this installation, read once."""
    return read_rule(RULE_FILE)


@cache
def choose(
    seq_len: int, block_size: int, topk: int, head_dim: int, documents: int = 1, rule: Rule | None = None
) -> Choice:
    """The path for `documents` documents of together `seq_len` tokens; `topk` counts the query's own block.

    Only what is known without asking the GPU enters: of packed documents their mean length.
    """
    rule = stored_rule() if rule is None else rule
    past = max(seq_len - 1, 0) // block_size
    if topk > past:
        return Choice("dense", f"topk {topk} covers every block a query can see (at most {past + 1})")
    if past > UNION_MAX_PAST:
        return Choice("routed", f"{past} past blocks, more than the {UNION_MAX_PAST} of the union path")
    length = max(1, seq_len // max(1, documents))
    share = density(length, block_size, topk)
    what = f"density {share:.2f} at {length} tokens, blocks of {block_size}, head_dim {head_dim}"
    what += f" ({documents} documents)" if documents > 1 else ""
    if not rule.thresholds:
        return Choice("routed", f"{what}; the union path was {rule.origin}")
    near = _nearest(rule, length, block_size, head_dim, documents > 1)
    if near is None:
        return Choice("routed", f"{what}; nothing near was measured ({rule.origin})")
    where = f"at {near.seq_len} tokens, blocks of {near.block_size} ({rule.origin})"
    if near.density is None:
        return Choice("routed", f"{what}; the union path won at no density {where}")
    # densities of the same shape are computed twice, once from the file: equal must count as reached
    path: PathName = "union" if share >= near.density - 1e-6 else "routed"
    return Choice(path, f"{what}; the union path won from density {near.density:.2f} on {where}")


def explain(seq_len: int, block_size: int, topk: int, head_dim: int, documents: int = 1) -> str:
    """One line: the path that runs on this shape, and why."""
    choice = choose(seq_len, block_size, topk, head_dim, documents)
    return f"{choice.path}: {choice.reason}"


def _nearest(rule: Rule, length: int, block_size: int, head_dim: int, packed: bool) -> Threshold | None:
    """The measured shape closest to this one in length and block size, if one is close."""

    def away(t: Threshold) -> tuple[float, float]:
        return abs(math.log2(t.seq_len / length)), abs(math.log2(t.block_size / block_size))

    near = [
        t
        for t in rule.thresholds
        if t.head_dim == head_dim
        and t.packed == packed
        and away(t)[0] <= math.log2(_LENGTH_FACTOR)
        and away(t)[1] <= math.log2(_BLOCK_FACTOR)
    ]
    return min(near, key=lambda t: (sum(away(t)), t.block_size, t.seq_len), default=None)
