"""The entry `moba` of a Hugging Face config.json, as `model.hf_attention` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conf.errors import UserError
from model.hf_config import FAMILIES
from model.schedule import FULL, LayerPlan, check_chooser

_REQUIRED, _OPTIONAL = {"block_size", "topk", "layers"}, {"choose", "decode"}
_ENTRY = 'config.json: "moba"'


@dataclass(frozen=True)
class MobaSettings:
    """The entry `moba` of a config.json.

    Attributes:
        plans: of every layer, for everything but decode steps.
        decode: full | moba.
    """

    plans: tuple[LayerPlan, ...]
    decode: str

    @classmethod
    def of(cls, config: Any) -> MobaSettings:
        """Read and check the settings of a transformers config.

        Raises:
            UserError: a model family that is not supported, no entry, missing or unknown keys, bad values.
        """
        if config.model_type not in FAMILIES:
            raise UserError(
                f'attn_implementation="moba" supports {", ".join(FAMILIES)}, not model_type={config.model_type}'
            )
        raw = getattr(config, "moba", None)
        if raw is None:
            raise UserError(
                'attn_implementation="moba": config.json has no entry "moba"; export with `moba export`, or set '
                'config.moba = {"block_size": 512, "topk": 3, "layers": [0, 1, ...]}'
            )
        if not isinstance(raw, dict) or not _REQUIRED <= set(raw) <= _REQUIRED | _OPTIONAL:
            raise UserError(
                f"{_ENTRY}: {raw!r} must have block_size, topk and layers, and may have choose and decode"
            )
        num_layers, size, topk = config.num_hidden_layers, raw["block_size"], raw["topk"]
        layers, chooser, decode = raw["layers"], raw.get("choose", "moba"), raw.get("decode", "full")
        if not all(isinstance(n, int) and n >= 1 for n in (size, topk)):
            raise UserError(f"{_ENTRY}: block_size={size} and topk={topk} must be integers of at least 1")
        if not isinstance(layers, list) or not all(n in range(num_layers) for n in layers):
            raise UserError(f"{_ENTRY}: layers={layers} must be a list of numbers from 0 to {num_layers - 1}")
        if decode not in ("full", "moba"):
            raise UserError(f"{_ENTRY}: decode={decode} is not known: use full or moba")
        check_chooser(f"{_ENTRY}: choose", chooser, topk)
        moba = LayerPlan("moba", size, topk, chooser)
        return cls(tuple(moba if n in layers else FULL for n in range(num_layers)), decode)
