"""RULER's thirteen tasks by name, and how a sample of one is made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from conf.errors import UserError
from eval.ruler.cwe import CommonWords
from eval.ruler.fwe import FrequentWords
from eval.ruler.niah import Niah
from eval.ruler.qa import QuestionAnswering
from eval.ruler.sample import Draft, Sample, largest_fitting, require_fit, sample_rng
from eval.ruler.template import COMMON_WORDS, FREQUENT_WORDS, NIAH, QUESTION_ANSWERING, VARIABLE_TRACKING, wrap
from eval.ruler.texts import Texts
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
    """A generator: `draft(rng, size, index)` is the same text for the same random state, size and sample."""

    @property
    def tokens(self) -> int: ...  # generation budget

    @property
    def smallest(self) -> int: ...  # least haystack size

    def draft(self, rng: random.Random, size: int, index: int) -> Draft: ...


NEEDLE = "needle_"  # one needle at a depth in percent, as needle_050: not of RULER's thirteen


def check_task(name: str, texts: Texts) -> None:
    """Raise a `UserError` unless the task can be made with these texts."""
    make_task(name, 1, len, texts)


def make_task(name: str, length: int, count: Callable[[str], int], texts: Texts) -> Task:
    """The generator of a task at a nominal length.

    Args:
        count: tokens of a text, for the fixed parts.
        texts: for the tasks that need more than is shipped.

    Raises:
        UserError: an unknown task, or one whose texts are not there.
    """
    essay: dict[str, Callable[[], Task]] = {
        "niah_single_2": lambda: Niah("essay", essays=texts.essays),
        "niah_single_3": lambda: Niah("essay", value_kind="uuids", essays=texts.essays),
        "niah_multikey_1": lambda: Niah("essay", keys=4, essays=texts.essays),
        "niah_multivalue": lambda: Niah("essay", values=4, essays=texts.essays),
        "niah_multiquery": lambda: Niah("essay", queries=4, essays=texts.essays),
        "qa_1": lambda: QuestionAnswering(name, texts.squad),
        "qa_2": lambda: QuestionAnswering(name, texts.hotpotqa),
    }
    built_in: dict[str, Callable[[], Task]] = {
        "niah_single_1": lambda: Niah("noise"),
        "niah_multikey_2": lambda: Niah("needle"),
        "niah_multikey_3": lambda: Niah("needle", key_kind="uuids", value_kind="uuids"),
        "vt": lambda: VariableTracking.fitted(length, count),
        "cwe": lambda: CommonWords(length, texts.more_words),
        "fwe": lambda: FrequentWords(length),
    }
    if name.startswith(NEEDLE):
        depth = int(name.removeprefix(NEEDLE)) / 100
        return Niah("essay", essays=texts.essays, depth=depth) if texts.data else Niah("noise", depth=depth)
    if name not in OFFICIAL:
        raise UserError(f"ruler.tasks: {name} is unknown; there are {', '.join(OFFICIAL)}")
    return (built_in | essay)[name]()


def answer_tokens(name: str) -> int:
    """Generation budget of a task."""
    if name.startswith(("niah", NEEDLE)):
        return NIAH.tokens
    texts = {"vt": VARIABLE_TRACKING, "cwe": COMMON_WORDS, "fwe": FREQUENT_WORDS}
    return texts.get(name, QUESTION_ANSWERING).tokens


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
        return task.draft(sample_rng(seed, name, length, index), size, index)

    def tokens(size: int) -> int:
        made = draft(size)
        return count(wrap(made.text, model_template) + made.answer_prefix) + task.tokens

    try:
        size, used = largest_fitting(tokens, length, task.smallest, guess)
    except ValueError as error:
        raise require_fit(name, length, error) from error
    made = draft(size)
    return Sample(index, wrap(made.text, model_template), made.outputs, used, made.answer_prefix, size)
