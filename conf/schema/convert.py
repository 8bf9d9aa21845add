"""`moba prepare`, `moba import` and `moba export`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schema.data import ReadConfig, SyntheticConfig, TokenizerConfig


@dataclass
class PrepareConfig:
    """Root of `moba prepare`: one set of documents, tokenised."""

    out: str = MISSING
    source: str = MISSING  # stdlib | a folder or file | hub:NAME | synthetic
    heldout: float = 0.05  # share of documents kept for evaluation, chosen by hash; 0: none
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    workers: int = 0  # processes that tokenise; 0: one per core, fewer for little text


@dataclass
class ExportConfig:
    """Root of `moba export`: a checkpoint as a Hugging Face folder."""

    checkpoint: str = MISSING  # a run folder or one of its checkpoints
    out: str = MISSING
    dtype: str = "float32"  # float32 | bfloat16


@dataclass
class ImportConfig:
    """Root of `moba import`: a Hugging Face folder as a checkpoint."""

    hf: str = MISSING  # Hugging Face folder: Llama, Mistral, Qwen2 or Qwen3
    out: str = MISSING  # folder of the checkpoint
    tokenizer: str = ""  # folder or sentencepiece .model, where the folder has none of its own
