"""RoPE settings of a Hugging Face `config.json`, both ways.

Two forms exist: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (before). Both are
read; both are written, so that older servers find what they look for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conf.errors import UserError
from conf.schema import RopeConfig
from model.rope import check_rope, ntk_theta

DEFAULT_THETA = 10_000.0  # transformers' default when config.json names none

# Our field -> the key inside `rope_parameters`, by kind. `ntk` is a theta and leaves as `default`.
_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def to_hf(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The keys `rope_parameters`, `rope_theta` and `rope_scaling` of config.json."""
    check_rope(rope)
    kind, theta = rope.kind, rope.theta
    if kind == "ntk":
        kind, theta = "default", ntk_theta(rope.theta, rope.factor, head_dim)
    scaling: dict[str, Any] = {"rope_type": kind}
    for field, key in _KEYS[kind].items():
        if field != "attention_factor" or rope.attention_factor:  # 0 means: derived from the factor, there too
            scaling[key] = getattr(rope, field)
    return {
        "rope_parameters": {"rope_theta": theta, **scaling},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else scaling,
    }


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> RopeConfig:
    """RopeConfig of a parsed config.json, in either form.

    Raises:
        UserError: a kind or an option that is not supported, or a missing key.
    """
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    # rope_scaling of the older form holds no theta; transformers then looks beside it.
    theta = found.get("rope_theta") or config.get("rope_theta")
    theta = theta or (config.get("rope_parameters") or {}).get("rope_theta") or DEFAULT_THETA
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in _KEYS:
        raise UserError(f"{where}: rope type {kind} is not supported: {', '.join(_KEYS)} are")
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={partial} is not supported: only 1.0 is")
    if found.get("truncate", True) is not True:
        raise UserError(f"{where}: truncate=false of rope type yarn is not supported: remove it")
    if kind in ("llama3", "yarn"):
        _complete(found, config, kind)
    rope = RopeConfig(kind=kind, theta=float(theta))
    for field, key in _KEYS[kind].items():
        if found.get(key) is not None:
            setattr(rope, field, type(getattr(rope, field))(found[key]))
        elif key in ("factor", "low_freq_factor", "high_freq_factor"):
            raise UserError(f"{where}: rope type {kind} without {key}: add it to rope_parameters")
    check_rope(rope)
    return rope


def _complete(found: dict[str, Any], config: Mapping[str, Any], kind: str) -> None:
    """Fill in what transformers derives from other keys."""
    outer = config.get("original_max_position_embeddings")
    found["original_max_position_embeddings"] = (
        outer or found.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    )
    if kind != "yarn":
        return
    if found.get("factor") is None and found["original_max_position_embeddings"]:
        found["factor"] = config.get("max_position_embeddings", 0) / found["original_max_position_embeddings"]
    mscale, all_dim = found.get("mscale"), found.get("mscale_all_dim")
    if found.get("attention_factor") is None and mscale and all_dim and found.get("factor", 0) > 1:
        log = 0.1 * math.log(found["factor"])
        found["attention_factor"] = (mscale * log + 1.0) / (all_dim * log + 1.0)
