"""`moba prepare`: documents to token shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import PrepareConfig, TrainConfig
from launch import inspect, train
from launch.command import Command

INSPECT = "inspect"


def resolve(overrides: Sequence[str]) -> PrepareConfig | TrainConfig:
    """`inspect` as the first word: the rest is a training configuration."""
    if not overrides or overrides[0] != INSPECT:
        return compose("prepare", overrides)
    rest = list(overrides[1:])
    return train.resolve(rest if any(item.startswith("out=") for item in rest) else [*rest, "out=runs/inspect"])


def run(config: PrepareConfig | TrainConfig) -> int:
    """Prepare `config.source` into `config.out`; a set that is complete already is left as it is."""
    if isinstance(config, TrainConfig):
        return inspect.run(config)
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
data.sets.NAME.path of `moba train` can point to. A share of the documents is held out for evaluation. Killed half
way, the same command goes on with what is finished.

A source is a folder or file (.txt .md .py; .jsonl, also .gz and .zst; .parquet; .arrow), a folder of code
repositories (read.repos=1: each folder in it is one document), hub:NAME (streamed from the Hugging Face hub), or
synthetic (retrieval tasks made up). read.kind=chat takes conversations, with loss on the answers only;
read.kind=tokens lists of token ids. read.weight names the field with the weight of the loss: a number of a record
or of a message, or a list beside token ids.

moba prepare inspect takes the keys of `moba train` and shows each stage's mixture as it will be trained: shares by
domain and by document length, epochs, padding, balance of the ranks; plots/mixture.png below out.
""",
    examples=(
        "moba prepare out=runs/data/stdlib source=stdlib",
        "moba prepare out=runs/data/mine source=my/texts tokenizer.path=runs/data/stdlib/tokenizer",
        "moba prepare out=data/code source=my/clones read.repos=1 tokenizer.path=llama heldout=0.01 workers=16",
        "moba prepare out=data/chat source=chats.jsonl.zst read.kind=chat tokenizer.path=llama-instruct",
        "moba prepare out=data/mine source=ids.jsonl read.kind=tokens read.weight=weights tokenizer.path=llama",
        "moba prepare out=data/needles source=synthetic synthetic.lengths=[4096,32768] tokenizer.path=llama",
        "moba prepare inspect recipe=quickstart",
    ),
    resolve=resolve,
    run=run,
)
