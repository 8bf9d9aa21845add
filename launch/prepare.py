"""`moba prepare`: documents to token shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import PrepareConfig
from launch.command import Command


def resolve(overrides: Sequence[str]) -> PrepareConfig:
    return compose("prepare", overrides)


def run(config: PrepareConfig) -> int:
    """Prepare `config.source` into `config.out`; a set that is complete already is left as it is."""
    from data.prepare import prepare
    from data.store import TokenStore

    check_fields(config)
    manifest = prepare(
        Path(config.out), config.source, config.heldout, config.tokenizer,
        read=config.read, synthetic=config.synthetic, workers=config.workers,
    )  # fmt: skip
    for split in ("train", "heldout"):
        if not manifest.splits[split].documents:
            continue
        store = TokenStore(Path(config.out), split)
        print(f"{config.out} {split}: {store.num_docs:,} documents, {store.num_tokens:,} tokens")
    return 0


COMMAND = Command(
    name="prepare",
    summary="tokenise documents into memory-mapped shards",
    text="""
Reads text, trains a tokenizer or takes an existing one, and writes a data set folder that
data.sets.NAME.path of `moba train` can point to. A share of the documents is held out for evaluation.
""",
    examples=(
        "moba prepare out=runs/data/stdlib source=stdlib",
        "moba prepare out=runs/data/mine source=my/texts tokenizer.path=runs/data/stdlib/tokenizer",
    ),
    resolve=resolve,
    run=run,
)
