"""A small corpus: packages of made-up modules."""

from __future__ import annotations

import random
from pathlib import Path


def module(rng: random.Random, functions: int) -> str:
    """A module of functions that share no line with those of another seed."""
    word = ["".join(rng.choice("bdfgklm") + rng.choice("aeiou") for _ in range(5)) for _ in range(400)]
    parts = [f'"""Module {rng.choice(word)}."""\n']
    for _ in range(functions):
        a, b, c = rng.sample(word, 3)
        parts.append(
            f'\ndef {a}_{b}({c}, count):\n    """Of {b}."""\n    total = {c} + {rng.choice(word)}\n'
            f"    for {a} in range(count):\n        total = total * {a} - {rng.choice(word)}\n    return total\n"
        )
    return "\n".join(parts)


def make_packages(root: Path, packages: int, files: int = 6, functions: int = 12) -> Path:
    """`packages` folders of `files` modules below `root`."""
    rng = random.Random(0)
    for number in range(packages):
        folder = root / f"package{number:02d}"
        folder.mkdir(parents=True)
        for file in range(files):
            (folder / f"module{file}.py").write_text(module(rng, functions), encoding="utf-8")
    return root
