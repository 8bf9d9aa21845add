"""Parameter names and shapes of a model, from its config alone.

The one list that import, export, loading and counting compare against. Names are those of Hugging Face's
Llama, Mistral, Qwen2 and Qwen3 classes, which share one naming.
"""

from __future__ import annotations

import math

from conf.errors import UserError
from conf.schema import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
KEY_CONV = "key_conv.weight"  # how the names of the key convolution end


def head_dim(config: ModelConfig) -> int:
    """Width of one attention head; `head_dim=0` in the config means hidden_size / num_heads."""
    return config.head_dim or config.hidden_size // config.num_heads


def check_shapes(config: ModelConfig) -> None:
    """Refuse a shape that no model can have, naming the keys."""
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(config, key) < 1:
            raise UserError(f"model.{key}={getattr(config, key)} must be at least 1")
    if config.head_dim == 0 and config.hidden_size % config.num_heads:
        raise UserError(
            f"model.hidden_size={config.hidden_size} is not a multiple of model.num_heads={config.num_heads}: "
            "change one of them or set model.head_dim"
        )
    if head_dim(config) % 2:
        raise UserError(f"model.head_dim={head_dim(config)} must be even, for rotary position embedding")
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"model.num_heads={config.num_heads} is not a multiple of model.num_kv_heads={config.num_kv_heads}"
        )


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the model's order. A tied head is not listed."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
    q_out, kv_out = config.num_heads * dim, config.num_kv_heads * dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q_out, hidden),
        "self_attn.k_proj.weight": (kv_out, hidden),
        "self_attn.v_proj.weight": (kv_out, hidden),
        "self_attn.o_proj.weight": (hidden, q_out),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{n}_proj.bias": (out,) for n, out in (("q", q_out), ("k", kv_out), ("v", kv_out))}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    if config.key_conv:
        layer |= {f"self_attn.{KEY_CONV}": (config.key_conv, config.num_kv_heads, dim)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Trained numbers of the model; a tied head counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())
