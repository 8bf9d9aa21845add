"""RULER's thirteen tasks by name, and how a sample of one is made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from conf.errors import UserError
from eval.ruler.cwe import CommonWords
from eval.ruler.fwe import FrequentWords
from eval.ruler.niah import Niah
from eval.ruler.sample import Draft, Sample, largest_fitting, require_fit, sample_rng
from eval.ruler.template import wrap
from eval.ruler.vt import VariableTracking

OFFICIAL = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
BUILT_IN = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")  # need no outside data


class Task(Protocol):
    """A generator: `draft(rng, size)` is the same text for the same random state and size."""

    @property
    def tokens(self) -> int: ...  # generation budget

    @property
    def smallest(self) -> int: ...  # least haystack size

    def draft(self, rng: random.Random, size: int) -> Draft: ...


def check_task(name: str) -> None:
    """Raise a `UserError` unless the task can be made here."""
    if name in BUILT_IN:
        return
    if name in OFFICIAL:
        raise UserError(f"ruler.tasks: {name} needs text that is not shipped; built in are {', '.join(BUILT_IN)}")
    raise UserError(f"ruler.tasks: {name} is unknown; built in are {', '.join(BUILT_IN)}")


def make_task(name: str, length: int, count: Callable[[str], int]) -> Task:
    """The generator of a task at a nominal length. `count` gives the tokens of a text, for the fixed parts."""
    check_task(name)
    if name == "niah_single_1":
        return Niah("noise")
    if name == "niah_multikey_2":
        return Niah("needle")
    if name == "niah_multikey_3":
        return Niah("needle", key_kind="uuids", value_kind="uuids")
    if name == "vt":
        return VariableTracking.fitted(length, count)
    if name == "cwe":
        return CommonWords(length)
    return FrequentWords(length)


def make_sample(
    name: str,
    task: Task,
    index: int,
    length: int,
    *,
    seed: int,
    count: Callable[[str], int],
    model_template: str = "base",
    guess: int = 0,
) -> Sample:
    """Sample `index`: the largest haystack with prompt and generation budget within `length` tokens.

    Args:
        count: tokens of a whole prompt as the model will see it (with a BOS token if it gets one).
        guess: a haystack size to try first, such as the previous sample's.

    Raises:
        UserError: the task does not fit into so few tokens.
    """

    def draft(size: int) -> Draft:
        return task.draft(sample_rng(seed, name, length, index), size)

    def tokens(size: int) -> int:
        made = draft(size)
        return count(wrap(made.text, model_template) + made.answer_prefix) + task.tokens

    try:
        size, used = largest_fitting(tokens, length, task.smallest, guess)
    except ValueError as error:
        raise require_fit(name, length, error) from error
    made = draft(size)
    return Sample(index, wrap(made.text, model_template), made.outputs, used, made.answer_prefix, size)
