"""RULER's metrics and summary numbers, computed from saved predictions.

Source: NVIDIA RULER v1, `scripts/eval/synthetic/constants.py` and `scripts/eval/evaluate.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

THRESHOLD = 85.6  # Llama2-7B-chat at 4K: a length counts as effective down to here
CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """What is scored: stripped, control characters as newlines."""
    return CONTROL.sub("\n", prediction.strip()).strip()


def match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean share of a sample's references found in its prediction (ignoring case), in percent."""
    shares = [
        sum(r.lower() in p.lower() for r in refs) / len(refs)
        for p, refs in zip(predictions, references, strict=True)
    ]
    return round(sum(shares) / len(shares) * 100, 2)


def match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of samples with at least one reference in the prediction (ignoring case), in percent."""
    hits = [any(r.lower() in p.lower() for r in refs) for p, refs in zip(predictions, references, strict=True)]
    return round(sum(hits) / len(hits) * 100, 2)


def score_task(task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Score of a task in percent: `match_part` for question answering, `match_all` for all others."""
    cleaned = [clean(p) for p in predictions]
    return (match_part if task.startswith("qa") else match_all)(cleaned, references)


def mean_score(scores: Mapping[str, float]) -> float | None:
    """Unweighted mean over tasks."""
    return round(sum(scores.values()) / len(scores), 2) if scores else None


def weighted_means(by_length: Mapping[int, float]) -> tuple[float, float]:
    """RULER's wAvg (inc) and (dec): means over lengths, weights 1, 2, ... rising or falling with length."""
    scores = [by_length[length] for length in sorted(by_length)]
    rising = range(1, len(scores) + 1)
    total = sum(rising)
    increasing = sum(w * s for w, s in zip(rising, scores, strict=True)) / total
    decreasing = sum(w * s for w, s in zip(reversed(rising), scores, strict=True)) / total
    return round(increasing, 2), round(decreasing, 2)


def effective_length(by_length: Mapping[int, float]) -> int | None:
    """The longest length before the mean first falls below 85.6; None if it never reaches it."""
    effective = None
    for length in sorted(by_length):
        if by_length[length] < THRESHOLD:
            break
        effective = length
    return effective
