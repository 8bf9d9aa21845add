"""Question answering: one document with the answer among many others (RULER paper, section 3.4)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from conf.errors import UserError
from eval.ruler.sample import Draft
from eval.ruler.template import QUESTION_ANSWERING, fill
from eval.ruler.texts import Questions

MISSES = 200  # so many documents in a row that do not fit end the search for one that does


@dataclass(frozen=True)
class QuestionAnswering:
    """Question number `index` of a set, and as many other documents as fit, in an order of the sample's own.

    RULER shuffles every sample with one seed, which puts the answer at the same place each time; here it may be
    anywhere. Sizes are characters of other documents, so that prompts fill up to the shortest document. When the
    set has no more documents, distractors (never the answer) are repeated.
    """

    name: str
    source: Questions

    @property
    def tokens(self) -> int:
        return QUESTION_ANSWERING.tokens

    @property
    def smallest(self) -> int:
        return 0

    def draft(self, rng: random.Random, size: int, index: int) -> Draft:
        """The text with other documents of at most `size` characters."""
        if index >= len(self.source.questions):
            raise UserError(
                f"{self.name} has {len(self.source.questions)} questions: set ruler.samples to no more than that"
            )
        question = self.source.questions[index]
        seed, places = rng.getrandbits(64), random.Random(rng.getrandbits(64))
        chosen = [*question.own, *self._others(question.own, question.near, seed, size)]
        places.shuffle(chosen)
        shown = "\n\n".join(f"Document {i}:\n{self.source.documents[n]}" for i, n in enumerate(chosen, 1))
        text = fill(QUESTION_ANSWERING.template, context=shown, query=question.text)
        return Draft(text, QUESTION_ANSWERING.answer_prefix, list(question.answers))

    def _others(self, own: tuple[int, ...], near: tuple[int, ...], seed: int, size: int) -> list[int]:
        documents = self.source.documents
        order = _order(len(documents), near, seed)
        taken: list[int] = []
        left = size
        while True:
            misses, before = 0, left
            for n in order:
                if n in own:
                    continue
                if len(documents[n]) <= left:
                    taken.append(n)
                    left -= len(documents[n])
                    misses = 0
                else:
                    misses += 1
                    if misses >= MISSES:
                        break
            if misses or left == before:
                return taken


@lru_cache(maxsize=2)
def _order(number: int, near: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """All documents, the near ones first, each part shuffled."""
    rng, first = random.Random(seed), list(dict.fromkeys(near))
    rng.shuffle(first)
    close = set(first)
    others = [n for n in range(number) if n not in close]
    rng.shuffle(others)
    return (*first, *others)
