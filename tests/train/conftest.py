"""Worker pools that live as long as the test session, and one small prepared set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gloo import GlooPool


@pytest.fixture(scope="session")
def pool1() -> Iterator[GlooPool]:
    pool = GlooPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool2() -> Iterator[GlooPool]:
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool4() -> Iterator[GlooPool]:
    pool = GlooPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pools(pool1: GlooPool, pool2: GlooPool) -> dict[int, GlooPool]:
    """By world size."""
    return {1: pool1, 2: pool2}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set: 60 short made-up documents, 320 token ids."""
    import random

    from conf.schema import TokenizerConfig
    from data.prepare import prepare

    folder = tmp_path_factory.mktemp("text")
    words = [f"{a}{b}{c}" for a in "bdkmt" for b in "aeiou" for c in "lnrs"]
    draw = random.Random(0)
    for i in range(60):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(20, 400)))
        (folder / f"{i}.txt").write_text(text)
    out = tmp_path_factory.mktemp("sets") / "words"
    prepare(out, str(folder), 0.2, TokenizerConfig(train_vocab_size=320), progress=False)
    return out
