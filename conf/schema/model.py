"""The model, its position embedding and its attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """Shape of a Llama-like decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU)."""

    family: str = "llama"  # llama | mistral | qwen2 | qwen3: the Hugging Face class an export uses
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = 0  # 0: hidden_size / num_heads
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    key_conv: int = 0  # causal convolution of keys, kernel 3 or 5 (arXiv 2511.11571); 0: none
    init_std: float = 0.02


@dataclass
class RopeConfig:
    """Rotary position embedding of a stage. `kind` names follow transformers' `rope_type`."""

    kind: str = "default"  # default | linear | ntk | llama3 | yarn (a theta change alone is `default`)
    theta: float = 10_000.0
    factor: float = 1.0
    original_seq_len: int = 0  # length before scaling: llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn: factor on cos and sin; 0: 0.1 ln(factor) + 1


@dataclass
class StageRopeConfig(RopeConfig):
    """RoPE of a stage: what it leaves at `inherit` or 0 is taken over, as `conf.inherit` says.

    With `kind=inherit` every field left at 0 is that of the stage before (of `init` for the first stage; without
    `init` plain RoPE). With another kind only theta is taken over, and the rest has the defaults of the kind.
    """

    kind: str = "inherit"  # inherit | default | linear | ntk | llama3 | yarn
    theta: float = 0.0  # 0: inherit; another theta alone is adjusted base frequency (ABF)
    factor: float = 0.0  # new length / original length; linear is position interpolation
    low_freq_factor: float = 0.0  # llama3
    high_freq_factor: float = 0.0  # llama3
    beta_fast: float = 0.0  # yarn
    beta_slow: float = 0.0  # yarn


@dataclass
class AttentionConfig:
    """Which layers use MoBA, with what blocks, when, and through which kernels.

    `topk` counts the query's own block. Fractions are of the stage's tokens.
    """

    kind: str = "full"  # full | moba
    backend: str = "auto"  # auto | reference | varlen | triton
    block_size: int = 512
    topk: int = 3
    choose: str = "moba"  # moba: the gate | window: topk - 1 blocks before | sink_window: first, topk - 2 before
    full_last_layers: int = 0  # the last n layers stay full
    full_every: int = 0  # every n-th layer stays full; 0: none
    full_layers: list[int] = field(default_factory=list)  # these layers stay full
    full_after: float = 1.0  # from this fraction on, every layer is full; 1: never
    topk_warmup: list[int] = field(default_factory=list)  # topk values stepped through before `topk`
    topk_warmup_until: float = 0.0  # the steps above share this first fraction evenly
