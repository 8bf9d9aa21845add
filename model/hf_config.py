"""One table between our configuration and the `config.json` of Hugging Face, used in both directions.

To add a family: one entry in `FAMILIES`, and the parity test in tests/model/test_hf_parity.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import ModelConfig, RopeConfig
from model.rope_hf import from_hf, to_hf
from model.shapes import check_shapes, head_dim

# Our field -> key of config.json, for all families.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
# What transformers takes where config.json lacks the key (num_key_value_heads and head_dim: see `_default`).
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
# A key that must have this value, written on export; a folder without the key has transformers' default.
_COMMON: dict[str, Any] = {"hidden_act": "silu"}


@dataclass(frozen=True)
class Family:
    """One Hugging Face model class.

    Attributes:
        architecture: class name in `architectures`.
        qkv_bias, qk_norm: switches of ModelConfig that this class means.
        fixed: keys whose value we rely on, with that value.
        unsafe_default: keys of `fixed` whose transformers default is another value, so that they may not
            be missing.
        kv_heads, head_dim: defaults of the class where they are numbers; 0: derived from the other sizes.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unsafe_default: Mapping[str, Any] = field(default_factory=dict)
    kv_heads: int = 0
    head_dim: int = 0


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", fixed={"attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        "MistralForCausalLM", fixed={"sliding_window": None}, unsafe_default={"sliding_window": 4096}, kv_heads=8
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, fixed={"use_sliding_window": False}, kv_heads=32),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        fixed={"use_sliding_window": False, "attention_bias": False},
        kv_heads=32,
        head_dim=128,
    ),
}


@dataclass(frozen=True)
class HfConfig:
    """What a config.json says.

    Attributes:
        model: shape.
        rope: position embedding.
        seq_len: `max_position_embeddings`.
        moba: the `moba` entry of a folder we exported ({"block_size", "topk", "layers"}), or None.
    """

    model: ModelConfig
    rope: RopeConfig
    seq_len: int
    moba: dict[str, Any] | None


def check_family(config: ModelConfig) -> Family:
    """The family of a model config.

    Raises:
        UserError: unknown family, or switches that the family's Hugging Face class does not have.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise UserError(f"model.family={config.family} is not known: use one of {', '.join(FAMILIES)}")
    if config.key_conv:
        raise UserError(
            f"model.key_conv={config.key_conv}: a Hugging Face folder cannot carry the key convolution "
            "(its class has no such weights); the checkpoint keeps them as self_attn.key_conv.weight"
        )
    if (config.qkv_bias, config.qk_norm) != (family.qkv_bias, family.qk_norm):
        raise UserError(
            f"model.family={config.family} means model.qkv_bias={str(family.qkv_bias).lower()} and "
            f"model.qk_norm={str(family.qk_norm).lower()}: change them, or the family"
        )
    return family


def to_config_json(config: ModelConfig, rope: RopeConfig, *, seq_len: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model trained with `rope` to `seq_len` tokens, weights stored as `dtype`."""
    family = check_family(config)
    values = {key: getattr(config, ours) for ours, key in FIELDS.items()}
    values["head_dim"] = head_dim(config)
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "dtype": dtype,
        **values,
        **_COMMON,
        **family.fixed,
        "max_position_embeddings": seq_len,
        **to_hf(rope, head_dim(config)),
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def read_config_json(folder: Path) -> HfConfig:
    """Parse `folder/config.json`.

    Raises:
        UserError: no such file, not JSON, an architecture or an option that is not supported, a missing size.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a Hugging Face folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object: copy it again")
    name = raw.get("model_type")
    family = FAMILIES.get(str(name))
    architectures = raw.get("architectures") or ([family.architecture] if family else [])
    if family is None or architectures != [family.architecture]:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise UserError(f"{path}: model_type={name} with {architectures} is not supported: {known} are")
    _check_options(raw, family, path)
    model = _model_config(raw, str(name), family, path)
    moba = raw.get("moba")
    return HfConfig(model, from_hf(raw, str(path)), int(raw.get("max_position_embeddings") or 0), moba)


def _check_options(raw: dict[str, Any], family: Family, path: Path) -> None:
    """Options that would make transformers compute something else than we do."""
    required = {**_COMMON, **family.fixed}
    for key, wanted in required.items():
        value = raw.get(key, family.unsafe_default.get(key, wanted))
        if value != wanted:
            verb = "set it to" if key == "sliding_window" else "only this is:"
            raise UserError(f"{path}: {key}={json.dumps(value)} is not supported: {verb} {json.dumps(wanted)}")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or []):
        raise UserError(f"{path}: layer_types other than full_attention are not supported")
    if raw.get("quantization_config"):
        raise UserError(f"{path}: quantized weights (quantization_config) are not supported: use the full ones")


def _model_config(raw: dict[str, Any], name: str, family: Family, path: Path) -> ModelConfig:
    values: dict[str, Any] = {}
    for ours, key in FIELDS.items():
        value = raw.get(key)
        value = _default(key, raw, family) if value is None else value
        if value is None:
            raise UserError(f"{path}: {key} is missing: copy the folder again")
        kind = {"norm_eps": float, "init_std": float, "tie_embeddings": bool}.get(ours, int)
        if not isinstance(value, (int, float) if kind is float else kind) or (kind is int and value is True):
            raise UserError(f"{path}: {key}={json.dumps(value)} is no {kind.__name__}: copy the folder again")
        values[ours] = kind(value)
    config = ModelConfig(family=name, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm, **values)
    check_shapes(config)
    return config


def _default(key: str, raw: dict[str, Any], family: Family) -> Any:
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    if key == "num_key_value_heads":
        return family.kv_heads if family.kv_heads and key not in raw else heads
    if key == "head_dim":
        return family.head_dim or (hidden // heads if hidden and heads else None)
    return DEFAULTS.get(key)
