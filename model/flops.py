"""Counting: parameters, useful FLOPs per token, bytes of keys and values.

Useful means what the mathematics asks for: causal pairs for full attention, selected pairs for MoBA, and no
credit for anything computed twice. One multiply-add is two FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.schema import ModelConfig
from model.schedule import LayerPlan
from model.shapes import head_dim, num_parameters

BACKWARD = 2  # backward costs twice the forward: gradients of inputs and of weights, for every product


@dataclass(frozen=True)
class TokenFlops:
    """Mean FLOPs per token of one document, by part."""

    dense: float  # projections, MLP and output head
    attention: float  # scores and weighted values
    gate: float  # MoBA's scores of blocks; no gradient, so forward only

    @property
    def total(self) -> float:
        return self.dense + self.attention + self.gate


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: all but the embedding table, norms and biases."""
    hidden, dim = config.hidden_size, head_dim(config)
    attention = hidden * dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * hidden * config.intermediate_size
    return config.num_layers * (attention + mlp) + hidden * config.vocab_size


def flops_per_token(
    config: ModelConfig, seq_len: int, plans: Sequence[LayerPlan], *, training: bool = True
) -> TokenFlops:
    """Mean FLOPs per token over a document of `seq_len` tokens.

    Args:
        config: shape of the model.
        seq_len: tokens of the document.
        plans: one per layer.
        training: forward and backward; False: forward only.
    """
    passes = 1 + BACKWARD if training else 1
    per_pair = 2 * config.num_heads * head_dim(config)  # one product over the head dimension, all heads
    pairs = sum(attended_pairs(seq_len, layer_plan) for layer_plan in plans)
    scored = sum(scored_blocks(seq_len, layer_plan) for layer_plan in plans)
    return TokenFlops(
        dense=2.0 * matmul_parameters(config) * passes,
        attention=2.0 * per_pair * pairs * passes / seq_len,
        gate=float(per_pair * scored) / seq_len,
    )


def attended_pairs(seq_len: int, layer_plan: LayerPlan) -> int:
    """(query, key) pairs of one head over one document: causal, or in the chosen blocks."""
    if layer_plan.kind == "full":
        return _triangle(seq_len)
    size, past = layer_plan.block_size, layer_plan.topk - 1
    blocks, tail = divmod(seq_len, size)
    own = blocks * _triangle(size) + _triangle(tail)
    # A query in block b attends to min(b, topk - 1) past blocks, each full.
    chosen = sum(min(block, past) for block in range(blocks)) * size + min(blocks, past) * tail
    return own + chosen * size


def scored_blocks(seq_len: int, layer_plan: LayerPlan) -> int:
    """(query, past block) scores of one head over one document."""
    if layer_plan.kind == "full" or layer_plan.choose != "moba":  # other choosers look at no key
        return 0
    blocks, tail = divmod(seq_len, layer_plan.block_size)
    return blocks * (blocks - 1) // 2 * layer_plan.block_size + blocks * tail


def kv_bytes(config: ModelConfig, tokens: int, itemsize: int = 2) -> int:
    """Bytes of keys and values of all layers for `tokens` cached tokens."""
    return 2 * config.num_layers * config.num_kv_heads * head_dim(config) * tokens * itemsize


def _triangle(count: int) -> int:
    return count * (count + 1) // 2


__all__ = [
    "TokenFlops",
    "attended_pairs",
    "flops_per_token",
    "kv_bytes",
    "matmul_parameters",
    "num_parameters",
    "scored_blocks",
]
