"""Frequent words extraction: the three most frequent of Zipf-distributed made-up words (RULER paper, 3.3)."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from eval.ruler.sample import Draft
from eval.ruler.template import FREQUENT_WORDS, fill

SHUFFLE_SEED = 42  # RULER shuffles every sample with the same seed


def zeta(s: float, terms: int = 1000) -> float:
    """Riemann zeta for s > 1: a partial sum and the Euler-Maclaurin tail (error below 1e-15 at s = 2)."""
    head = sum(k**-s for k in range(1, terms))
    return head + terms ** (1 - s) / (s - 1) + terms**-s / 2 + s * terms ** (-s - 1) / 12


@dataclass(frozen=True)
class FrequentWords:
    """Word of rank k appears size * k^-alpha / zeta(alpha) times; rank 1 is replaced by dots, ranks 2-4 are asked.

    Attributes:
        length: the sample's nominal length in tokens; one word of the vocabulary for every 50.
    """

    length: int
    alpha: float = 2.0
    word_length: int = 6

    @property
    def tokens(self) -> int:
        return FREQUENT_WORDS.tokens

    @property
    def smallest(self) -> int:
        """From here on rank 4 appears more often than rank 5, so that the answer is unique."""
        return 53

    def draft(self, rng: random.Random, size: int, index: int) -> Draft:
        """The text with about `size` words (rare ones round down to none)."""
        count = max(self.length // 50, 4)
        vocabulary: set[str] = set()
        while len(vocabulary) < count:
            vocabulary.add("".join(rng.choices(string.ascii_lowercase, k=self.word_length)))
        words = sorted(vocabulary)
        random.Random(rng.getrandbits(64)).shuffle(words)
        words[0] = "..."
        scale = size / zeta(self.alpha)
        text = [word for rank, word in enumerate(words, 1) for _ in range(int(scale * rank**-self.alpha))]
        random.Random(SHUFFLE_SEED).shuffle(text)
        context = fill(FREQUENT_WORDS.template, context=" ".join(text))
        return Draft(context, FREQUENT_WORDS.answer_prefix, words[1:4])
