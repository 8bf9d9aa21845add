"""MoBA settings in the config.json of a Hugging Face folder, as `moba export` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.errors import UserError
from model.schedule import check_chooser


def checked_moba(raw: Any, num_layers: int, path: Path) -> dict[str, Any] | None:
    """The key `moba` of `path`/config.json: block_size, topk, layers, choose. None: it has none.

    Raises:
        UserError: settings that make no plan.
    """
    if raw is None:
        return None
    try:
        block_size, topk, layers = int(raw["block_size"]), int(raw["topk"]), [int(i) for i in raw["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / 'config.json'}: the key moba needs block_size, topk and layers") from error
    if block_size < 1 or topk < 1 or not all(0 <= layer < num_layers for layer in layers):
        raise UserError(f"{path / 'config.json'}: moba has a size below 1 or a layer outside 0..{num_layers - 1}")
    choose = str(raw.get("choose", "moba"))
    check_chooser(f"{path / 'config.json'}: moba.choose", choose, topk)
    return {"block_size": block_size, "topk": topk, "layers": layers, "choose": choose}
