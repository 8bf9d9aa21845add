"""Variable tracking: follow a chain of assignments through noise (RULER paper, section 3.2)."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from eval.ruler.sample import Draft, largest_fitting
from eval.ruler.template import NOISE, VARIABLE_TRACKING, fill

EXAMPLE_TOKENS = 500  # of the solved example, at RULER's own lengths (4096 and up)
EXAMPLE_SHARE = 8  # below those the example takes at most length / 8
SHORTEST_EXAMPLE = 5  # lines of noise


@dataclass(frozen=True)
class VariableTracking:
    """`chains` chains of `hops` hops; the names of the first chain are the answer.

    The prompt begins with a short solved example whose names and value are drawn anew for every sample.
    """

    example_noise: int = SHORTEST_EXAMPLE  # lines of noise in the example: see `fitted`
    chains: int = 1
    hops: int = 4

    @classmethod
    def fitted(cls, length: int, count: Callable[[str], int]) -> VariableTracking:
        """The task with the largest example that RULER allows for prompts of `length` tokens."""

        def example_tokens(lines: int) -> int:
            example = cls()._problem(random.Random(0), lines, name_length=3)
            return count(example.text + example.answer_prefix)

        try:
            budget = min(EXAMPLE_TOKENS, length // EXAMPLE_SHARE)
            return cls(largest_fitting(example_tokens, budget, SHORTEST_EXAMPLE)[0])
        except ValueError:
            return cls(SHORTEST_EXAMPLE)

    @property
    def tokens(self) -> int:
        return VARIABLE_TRACKING.tokens

    @property
    def smallest(self) -> int:
        return self.hops + 1

    def draft(self, rng: random.Random, size: int, index: int) -> Draft:
        """The text with `size` lines of noise."""
        example = self._problem(rng, self.example_noise, name_length=3)
        problem = self._problem(rng, size, name_length=5)
        shown = f"{example.text}{example.answer_prefix} {' '.join(example.outputs)}\n\n"
        return Draft(shown + problem.text, problem.answer_prefix, problem.outputs)

    def _problem(self, rng: random.Random, size: int, name_length: int) -> Draft:
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(rng.choices(string.ascii_uppercase, k=name_length))
            if name not in names:
                names.append(name)
        values: list[str] = []
        while len(values) < self.chains:
            value = str(rng.randint(10_000, 99_998))
            if value not in values:
                values.append(value)
        lines = [NOISE] * size
        for number, value in enumerate(values):
            chain = names[number * (self.hops + 1) : (number + 1) * (self.hops + 1)]
            steps = [f"VAR {chain[0]} = {value}"]
            steps += [f"VAR {new} = VAR {old} " for old, new in pairwise(chain)]
            places = sorted(rng.sample(range(len(lines)), len(steps)))
            for shift, (place, step) in enumerate(zip(places, steps, strict=True)):
                lines.insert(place + shift, step)
        fields = {"query": values[0], "num_v": str(self.hops + 1)}
        return Draft(
            fill(VARIABLE_TRACKING.template, context="\n".join(lines).replace(". \n", ".\n"), **fields),
            fill(VARIABLE_TRACKING.answer_prefix, **fields),
            names[: self.hops + 1],
        )
