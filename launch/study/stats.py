"""Arms compared: means over documents and seeds, with errors for both."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.study.plan import Group

UNFINISHED = "unfinished"  # folder beside `arms` for arms that are being measured
Json = dict[str, Any]
Key = tuple[str, ...]  # choices of an arm, in the order of the group's axes
Arms = dict[Key, dict[int, Json]]  # choices -> seed -> result


@dataclass(frozen=True)
class Mean:
    """A mean in nats. `by_seed`: the mean of each seed; `documents`: standard error over documents, of their means
    over seeds; `seeds`: standard error over seeds. Errors are None with fewer than two."""

    value: float
    by_seed: tuple[float, ...]
    documents: float | None
    seeds: float | None

    @property
    def text(self) -> str:
        return f"{self.value:.4f} ± {'–' if self.seeds is None else f'{self.seeds:.4f}'}"

    @property
    def signed(self) -> str:
        """The value with its sign, its error over documents and that over seeds."""
        over = [f"{name} {error:.4f}" for name, error in (("documents", self.documents), ("seeds", self.seeds)) if
                error is not None]  # fmt: skip
        return f"{self.value:+.4f}" + (f" (± {', '.join(over)})" if over else "")

    @property
    def error(self) -> float:
        """The larger of its errors; 0 without any."""
        return max(self.documents or 0.0, self.seeds or 0.0)

    @property
    def resolved(self) -> bool:
        """Whether it has two seeds and is over two standard errors from zero, by the larger of its errors."""
        return self.seeds is not None and abs(self.value) > 2 * self.error


def read_results(folder: Path) -> list[Json]:
    """The results of all arms, by name; in each as `start` that of the arm it started from, or None.

    Arms that were cut off while they were measured, but have all their losses, are among them, as `cut`.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("arms/*.json"))]
    expected = {result["group"]: len(result.get("losses", ())) for result in found}
    done = {result["arm"] for result in found}
    for path in sorted(folder.glob(f"{UNFINISHED}/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["arm"] not in done and len(result.get("losses", ())) == expected.get(result["group"], -1):
            found.append(result | {"cut": True})
    found.sort(key=lambda result: str(result["arm"]))
    named = {result["arm"]: result for result in found}
    return [result | {"start": named.get(result["starts"])} for result in found]


def own_plan(result: Json) -> str:
    """The plan that the arm ended its training with."""
    last = str(result["train"]["plans"][-1][1])
    return next(name for name, text in result["plans"].items() if text == last)


def longest(result: Json) -> int:
    """Which of the result's losses is that by position at the greatest length."""
    return max(at for at, place in enumerate(result["losses"]) if not place.get("whole"))


def by_choice(results: Sequence[Json], name: str, group: Group) -> Arms:
    """Choices -> seed -> result, of the measured arms of a group, in the order of its axes."""
    found: Arms = {}
    for result in results:
        if result["group"] == name and result.get("losses"):
            found.setdefault(tuple(result["choices"].values()), {})[int(result["seed"])] = result
    places = [list(options) for options in group.axes.values()]

    def order(key: Key) -> list[int]:
        return [options.index(choice) for options, choice in zip(places, key, strict=True)]

    return {key: found[key] for key in sorted(found, key=order)}


def values(result: Json, at: int, what: str, plan: str = "") -> list[float | None]:
    """By document: its mean loss, its trailing loss, or (`what` a number) that of a bucket; None: no tokens."""
    documents = [document[plan or own_plan(result)] for document in result["losses"][at]["documents"]]
    if what in ("loss", "trailing"):
        return [document[what] for document in documents]
    return [document["buckets"][int(what)] for document in documents]


def mean_of(seeds: dict[int, Json], at: int, what: str) -> Mean:
    """Mean of an arm over documents and seeds."""
    return _mean([values(result, at, what) for _, result in sorted(seeds.items())])


def difference(ours: dict[int, Json], theirs: dict[int, Json], at: int, what: str) -> Mean | None:
    """`ours` minus `theirs`, document by document and seed by seed; None without a common seed."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    rows = []
    for seed in common:
        pairs = zip(values(ours[seed], at, what), values(theirs[seed], at, what), strict=True)
        rows.append([None if a is None or b is None else a - b for a, b in pairs])
    return _mean(rows)


def plan_difference(seeds: dict[int, Json], at: int, what: str) -> Mean | None:
    """The same weights under the arm's own MoBA minus under full attention; None for arms that end with full."""
    own = {seed: result for seed, result in seeds.items() if own_plan(result) != "full"}
    if not own:
        return None
    rows = []
    for _, result in sorted(own.items()):
        pairs = zip(values(result, at, what), values(result, at, what, "full"), strict=True)
        rows.append([None if a is None or b is None else a - b for a, b in pairs])
    return _mean(rows)


def _mean(rows: Sequence[Sequence[float | None]]) -> Mean:
    kept = [
        [float(v) for v in column if v is not None] for column in zip(*rows, strict=True) if None not in column
    ]
    by_seed = tuple(sum(column[i] for column in kept) / len(kept) for i in range(len(rows)))
    per_document = [sum(column) / len(column) for column in kept]
    return Mean(sum(by_seed) / len(by_seed), by_seed, stderr(per_document), stderr(by_seed))


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None of fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return float((sum((v - mean) ** 2 for v in values) / (count - 1) / count) ** 0.5)


def baseline_of(group: Group, key: Key) -> Key | None:
    """The choices that `key` is compared with: itself with the baseline's choice; None for the baseline."""
    axis, _, choice = group.baseline.partition("=")
    names = list(group.axes)
    if axis not in names:
        return None
    place = names.index(axis)
    other = (*key[:place], choice, *key[place + 1 :])
    return None if other == key else other


def mean_curve(
    seeds: dict[int, Json], at: int, minus: dict[int, Json] | None = None
) -> tuple[list[float], list[Mean]]:
    """Middles of the position buckets and the mean in each; with `minus`, of the difference to those results."""
    edges = next(iter(seeds.values()))["losses"][at]["edges"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    means = [
        mean_of(seeds, at, str(i)) if minus is None else difference(seeds, minus, at, str(i))
        for i in range(len(middles))
    ]
    return middles, [mean for mean in means if mean is not None]
