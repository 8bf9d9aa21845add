"""Tiny models and packed batches for the tests of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from conf.constants import IGNORE_INDEX
from conf.schema import ModelConfig, RopeConfig
from model.hf_config import FAMILIES
from model.transformer import CausalLM

VOCAB = 64


def tiny_config(family: str = "llama", **changes: object) -> ModelConfig:
    """Two layers, four heads on two kv heads; head_dim differs from hidden_size / num_heads."""
    traits = FAMILIES[family]
    values: dict[str, object] = {
        "family": family,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "qkv_bias": traits.qkv_bias,
        "qk_norm": traits.qk_norm,
        "init_std": 0.3,  # large enough for attention to be far from uniform
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def tiny_model(config: ModelConfig | None = None, rope: RopeConfig | None = None, seed: int = 0) -> CausalLM:
    model = CausalLM(config or tiny_config(), rope or RopeConfig())
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # biases and norms at random, so that a missing one shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.add_(0.2 * noise)
    return model


def packed(lengths: list[list[int]], seed: int = 0) -> dict[str, Tensor | int]:
    """Arguments of `CausalLM.forward` but for plans: row r holds documents of lengths[r]."""
    generator = torch.Generator().manual_seed(seed)
    rows, seq_len = len(lengths), sum(lengths[0])
    tokens = torch.randint(0, VOCAB, (rows, seq_len + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    flat = [length for row in lengths for length in row]
    borders = torch.tensor([0, *flat]).cumsum(0)
    labels.view(-1)[borders[1:] - 1] = IGNORE_INDEX
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": labels,
        "positions": torch.cat([torch.arange(length) for length in flat]).view(rows, seq_len),
        "cu_seqlens": borders.int(),
        "max_seqlen": max(flat),
    }


def hidden_args(batch: dict[str, Tensor | int]) -> dict[str, Tensor | int]:
    """The arguments that `CausalLM.hidden` takes."""
    return {key: value for key, value in batch.items() if key != "labels"}
