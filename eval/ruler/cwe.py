"""Common words extraction: the ten most frequent words of a numbered list (RULER paper, section 3.3)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from eval.ruler.sample import Draft
from eval.ruler.template import COMMON_WORDS
from eval.ruler.words import base_words

COMMON = 10


@dataclass(frozen=True)
class CommonWords:
    """Ten words appear `frequent` times, the others `rare` times, after a solved example of the same kind.

    Attributes:
        length: nominal length in tokens; below 4096 RULER uses smaller counts.
        more_words: a longer list, for samples that need more words than wonderwords has.
    """

    length: int
    more_words: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return COMMON_WORDS.tokens

    @property
    def smallest(self) -> int:
        return COMMON + 1

    def draft(self, rng: random.Random, size: int, index: int) -> Draft:
        """The text with `size` different words. Beyond both word lists, pairs of words are used."""
        short = self.length < 4096
        example, example_answer = self._list(rng, *((20, 3, 1) if short else (40, 10, 3)))
        listed, answer = self._list(rng, size, *((6, 1) if short else (30, 3)))
        solved = " ".join(f"{i}. {word}" for i, word in enumerate(example_answer, 1))
        shown = f"{COMMON_WORDS.template.format(context=example)}{COMMON_WORDS.answer_prefix} {solved}\n"
        return Draft(shown + COMMON_WORDS.template.format(context=listed), COMMON_WORDS.answer_prefix, answer)

    def _list(self, rng: random.Random, size: int, frequent: int, rare: int) -> tuple[str, list[str]]:
        words = _distinct_words(rng, size, self.more_words)
        common, others = words[:COMMON], words[COMMON:]
        listed = common * frequent + others * rare
        random.Random(rng.getrandbits(64)).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), common


def _distinct_words(rng: random.Random, size: int, more: tuple[str, ...]) -> list[str]:
    words = base_words()
    if size <= len(words):
        return rng.sample(words, size)
    if size <= len(more):
        return rng.sample(more, size)
    pairs = rng.sample(range(len(words) ** 2), size)
    return [f"{words[pair // len(words)]}-{words[pair % len(words)]}" for pair in pairs]
