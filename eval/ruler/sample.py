"""One RULER sample, and the search for the haystack that fills its token budget."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from conf.errors import UserError

GROWTH = 8  # at most so many times larger from one try to the next: the slope of small sizes says little
ENOUGH = 0.995  # of the budget: closer than this the search stops, long haystacks are slow to tokenise


@dataclass(frozen=True)
class Draft:
    """A task text with its answer, before the model template: what a generator makes for a given size."""

    text: str
    answer_prefix: str
    outputs: list[str]


@dataclass(frozen=True)
class Sample:
    """A finished sample, with RULER's field names.

    `input` carries the model template but not the answer prefix, which is appended at call time; `length`
    counts the tokens of both plus the generation budget. `size` is the haystack size that was found.
    """

    index: int
    input: str
    outputs: list[str]
    length: int
    answer_prefix: str
    size: int

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix


def sample_rng(seed: int, task: str, length: int, index: int, purpose: str = "") -> random.Random:
    """The random stream of one sample. It depends on nothing that happened before, so samples can be made in
    any order, and again after a kill, with the same result. (String seeds are hashed by SHA-512: stable.)"""
    return random.Random(f"ruler/{seed}/{task}/{length}/{index}/{purpose}")


def largest_fitting(count: Callable[[int], int], budget: int, smallest: int, guess: int = 0) -> tuple[int, int]:
    """The largest size with `count(size) <= budget`, and its count; `count` grows (nearly) linearly.

    Brackets the answer by interpolation, which needs three or four evaluations where bisection of the same
    bracket needs a dozen; each evaluation tokenises a whole prompt.

    Raises:
        ValueError: even `smallest` does not fit; the text says how many tokens it takes.
    """
    floor = count(smallest)
    if floor > budget:
        raise ValueError(f"{floor} tokens are the least, {budget} are given")
    low, low_count = smallest, floor
    high: int | None = None
    size = max(guess, smallest + 1)
    while low_count < ENOUGH * budget or high is None:
        if high is not None:
            if high - low <= 1:
                break
            size = size if low < size < high else (low + high) // 2
        else:
            size = max(size, low + 1)
        tokens = count(size)
        if tokens <= budget:
            if size > low:
                low, low_count = size, tokens
            if tokens >= ENOUGH * budget:
                break
        else:
            high = size
        per_unit = max((tokens - floor) / max(size - smallest, 1), 1e-9)
        size = low + max(1, min(int((budget - low_count) / per_unit), GROWTH * max(size, 16)))
    return low, low_count


def require_fit(task: str, length: int, error: ValueError) -> UserError:
    return UserError(f"ruler.lengths={length} is too short for {task}: {error}, including what is to be generated")
