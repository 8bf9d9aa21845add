"""Hugging Face folders as users bring them: random weights and a tokenizer, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.model.build import VOCAB  # noqa: F401  (the vocabulary of small models)

SOURCES = Path(__file__).parents[2]


def texts() -> list[str]:
    """Python files of this repository: real text, the same everywhere."""
    return [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("conf/*.py"))]


def save_tokenizer(folder: Path, vocab_size: int = 400) -> None:
    from data.tokenizer import train_tokenizer

    train_tokenizer(texts(), vocab_size, folder)


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    return LlamaConfig(**{**settings, **changes})


def save_llama(
    folder: Path, tokenizer: bool = True, max_shard_size: str = "5GB", dtype: str = "float32", **changes: Any
) -> Path:
    """A Llama folder; weights depend on the configuration alone."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(**changes)).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_texts(folder: Path, copies: int = 1) -> Path:
    """A folder of documents to prepare."""
    folder.mkdir()
    for index, text in enumerate(texts() * copies):
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return folder
