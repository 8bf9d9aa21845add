"""Needles in a haystack: RULER's retrieval tasks (RULER paper, section 3.1).

Needles `One of the special magic numbers for <key> is: <value>.` are hidden in a haystack of repeated noise, of
other needles or of essays.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from eval.ruler.sample import Draft
from eval.ruler.template import NEEDLE, NIAH, NOISE, fill, singular
from eval.ruler.texts import Essays
from eval.ruler.words import draw

DEPTHS = tuple(round(i * 100 / 39) for i in range(40))  # percent of the sentences of an essay haystack


@dataclass(frozen=True)
class Niah:
    """A retrieval task. `keys` is raised to `queries` if that is larger.

    Attributes:
        haystack: noise, needle or essay; the last needs `essays`.
        depth: share of the haystack before the needles; None: drawn for every sample.
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    essays: Essays | None = None
    depth: float | None = None

    @property
    def tokens(self) -> int:
        return NIAH.tokens

    @property
    def smallest(self) -> int:
        """Fewest haystack units: each needle is inserted at a place of its own."""
        return max(self.keys, self.queries) * self.values

    def draft(self, rng: random.Random, size: int, index: int) -> Draft:
        """The text with `size` haystack units: lines of noise, other needles or words of the essays."""
        keys = [draw(rng, self.key_kind) for _ in range(max(self.keys, self.queries))]
        values = [[draw(rng, self.value_kind) for _ in range(self.values)] for _ in keys]
        needles = [
            NEEDLE.format(type_needle_v=self.value_kind, key=key, value=value)
            for key, own in zip(keys, values, strict=True)
            for value in own
        ]
        rng.shuffle(needles)
        asked = rng.sample(range(len(keys)), self.queries)
        places = random.Random(rng.getrandbits(64))  # of its own: the needles do not depend on the size
        context = self._context(rng, places, needles, size)

        queries = [keys[i] for i in asked]
        query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
        template, prefix, kind = NIAH.template, NIAH.answer_prefix, self.value_kind
        if self.queries * self.values == 1:
            template, prefix, kind = singular(template), singular(prefix), kind[:-1]
        return Draft(
            fill(template, type_needle_v=kind, context=context, query=query),
            fill(prefix, type_needle_v=kind, query=query),
            [value for i in asked for value in values[i]],
        )

    def _context(self, rng: random.Random, places: random.Random, needles: list[str], size: int) -> str:
        if self.essays is not None:
            return self._essay(places, needles, self.essays.take(size))
        if self.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                NEEDLE.format(
                    type_needle_v=self.value_kind, key=draw(rng, self.key_kind), value=draw(rng, self.value_kind)
                )
                for _ in range(size)
            ]
        at = places.sample(range(size), len(needles)) if self.depth is None else [round(self.depth * size)]
        for index, needle in zip(sorted(at, reverse=True), needles, strict=True):
            lines.insert(index, needle)
        return "\n".join(lines)

    def _essay(self, places: random.Random, needles: list[str], sentences: list[str]) -> str:
        """Needles between sentences, each at one of RULER's forty depths."""
        depths = places.sample(DEPTHS, len(needles)) if self.depth is None else [self.depth * 100]
        at = sorted(int(len(sentences) * depth / 100) for depth in depths)
        for shift, (index, needle) in enumerate(zip(at, needles, strict=True)):
            sentences.insert(index + shift, needle)
        return " ".join(sentences)
