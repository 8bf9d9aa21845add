"""What is read, prepared and mixed."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class DomainRule:
    """What of its set a domain uses. Lengths are of documents, in tokens, with the eos that ends each."""

    set: str = ""  # key of data.sets; empty: the domain's own name
    min_length: int = 0  # shorter documents are left out
    max_length: int = 0  # longer documents are left out; 0: none
    long: str = "auto"  # documents above seq_len: split | truncate | drop | error; auto: split text, drop chats
    upsample: dict[int, float] = field(default_factory=dict)  # documents of at least N tokens: times per epoch
    loss_weight: float = 1.0  # of the domain's tokens in the loss, times their own weights


@dataclass
class StageDataConfig:
    """What a stage trains on. Domains are keyed by name; each points to a folder made by `moba prepare`."""

    domains: dict[str, float] = field(default_factory=dict)  # name -> weight; a name is a key of data.sets
    rules: dict[str, DomainRule] = field(default_factory=dict)  # domain -> what of its set it uses
    unit: str = "weight"  # of the numbers in domains: weight | tokens, which must add up to the stage's
    packing: str = "concat"  # concat: concatenate and split | best_fit: whole documents, where they fit best
    window: int = 65_536  # best_fit: documents sorted by length at a time, a quarter of the set at most
    balance: bool = True  # share the rows of a global batch out by attention cost, not in their order


@dataclass
class TokenizerConfig:
    """Tokenizer: an existing folder or model file, or one trained by `moba prepare`."""

    path: str = ""  # Hugging Face folder or sentencepiece .model; empty: train one
    train_vocab_size: int = 4096  # when training
    train_chars: int = 20_000_000  # at most so many characters are read for training


@dataclass
class ReadConfig:
    """How the records of a source become documents."""

    kind: str = "text"  # text | chat: conversations, with loss on the assistant's turns | tokens: lists of ids
    field: str = ""  # of JSONL, parquet, arrow, hub records; empty: text, for chat messages, for tokens input_ids
    weight: str = ""  # field with the weight of the loss: of a record, a message or a list by ids; empty: none
    repos: int = 0  # n: each folder n levels below the source is one document, a code repository; 0: files are
    subset: str = ""  # configuration of a hub data set
    split: str = "train"  # of a hub data set
    max_chars: int = 50_000_000  # a longer document is a bad record
    on_error: str = "skip"  # a bad record: skip (counted and listed in skipped.jsonl) | fatal


@dataclass
class SyntheticConfig:
    """Retrieval tasks made up for training: `source: synthetic`. Lengths are of whole documents."""

    tasks: list[str] = field(default_factory=lambda: ["needle", "multikey", "tracking", "copy"])  # lookup, chain
    lengths: list[int] = field(default_factory=lambda: [4096])  # each task in each length, nearly filled
    documents: int = 1000  # per task and length
    loss: str = "answer"  # answer | all: on which tokens loss is taken
    seed: int = 0


@dataclass
class DataSetConfig:
    """One prepared set of documents and, if it may be prepared on demand, where its text comes from."""

    path: str = MISSING  # folder with manifest.json and token shards
    source: str = ""  # stdlib | a folder or file | hub:NAME | synthetic; empty: the set must exist
    heldout: float = 0.05  # share of documents kept for evaluation, chosen by hash; 0: none
    read: ReadConfig = field(default_factory=ReadConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass
class DataConfig:
    sets: dict[str, DataSetConfig] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    workers: int = 0  # processes that tokenise; 0: one per core, fewer for little text
