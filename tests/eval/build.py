"""A tiny model with a tokenizer and prepared documents, as a Hugging Face folder and a data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from conf.schema import ModelConfig, RopeConfig, TokenizerConfig
from data.prepare import prepare
from data.tokenizer import Tokenizer, load_tokenizer
from model.hf import write_hf
from model.hf_config import to_config_json
from model.transformer import CausalLM
from model.weights import TensorFiles

WORDS = (
    "the",
    "grass",
    "is",
    "green",
    "and",
    "blue",
    "sky",
    "over",
    "here",
    "we",
    "go",
    "back",
    "again",
    "number",
)


@dataclass(frozen=True)
class Small:
    """`hf`: a Hugging Face folder with MoBA settings; `data`: held-out documents in the same tokenizer."""

    hf: Path
    data: Path
    config: ModelConfig
    tokenizer: Tokenizer


def text(number: int, words: int) -> str:
    """Deterministic prose-like filler with a few digits and line ends."""
    picked = (WORDS[(i * (number + 3) + i * i) % len(WORDS)] for i in range(words))
    return f"def f{number}():\n    " + " ".join(picked) + f"\n    return {number * 37}\n"


def build(folder: Path, head_dim: int = 0) -> Small:
    source = folder / "text"
    source.mkdir(parents=True)
    for i in range(40):
        (source / f"file{i}.txt").write_text(text(i, 150 + 10 * i))
    data = folder / "data"
    prepare(data, str(source), 0.5, TokenizerConfig(train_vocab_size=400), progress=False)
    tokenizer = load_tokenizer(data / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        init_std=0.3,
    )
    model = CausalLM(config, RopeConfig())
    model.init_weights(torch.Generator().manual_seed(1))
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / "weights.safetensors")
    description = to_config_json(config, RopeConfig(), seq_len=128, dtype="float32")
    description["moba"] = {"block_size": 16, "topk": 2, "layers": [0, 1]}
    weights = TensorFiles([folder / "weights.safetensors"])
    write_hf(config, description, weights, folder / "hf", "float32", data / "tokenizer")
    return Small(folder / "hf", data, config, tokenizer)
