"""Random words, numbers and uuids as RULER draws them (word lists: the wonderwords package)."""

from __future__ import annotations

import random
import uuid
from functools import lru_cache
from importlib import resources


@lru_cache(maxsize=8)
def word_list(name: str) -> tuple[str, ...]:
    """A list of the wonderwords package: `noun`, `adjective` or `verb`, in the order of its file."""
    text = (resources.files("wonderwords") / "assets" / f"{name}list.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@lru_cache(maxsize=1)
def base_words() -> tuple[str, ...]:
    """Distinct nouns, adjectives and verbs, sorted: the words of the counting task."""
    return tuple(sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")}))


def draw(rng: random.Random, kind: str) -> str:
    """One value: `words` (adjective-noun), `numbers` (seven digits) or `uuids` (version 4)."""
    if kind == "words":
        return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    raise ValueError(f"unknown kind {kind!r}: words, numbers or uuids")
