"""The tokenizer of an exported Hugging Face folder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from conf.constants import GENERATION_FILE
from conf.errors import UserError

_log = logging.getLogger(__name__)
_OF_ITS_WRITER = ("_from_model_config", "transformers_version")


def copy_tokenizer(source: Path, out: Path) -> dict[str, Any]:
    """Copy a tokenizer folder; returns its bos and eos ids for the two configuration files."""
    if not source.is_dir():
        raise UserError(f"{source} does not exist: the checkpoint lacks its tokenizer")
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    tokenizer = _load(source)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def generation_settings(folder: Path, tokens: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json of an export: as the one that came with the tokenizer, which may name several ids
    that end an answer; where there is none, greedy, up to the tokenizer's own eos in `tokens`."""
    try:
        found = json.loads((folder / GENERATION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {"do_sample": False, **tokens}
    return {**tokens, **{key: value for key, value in found.items() if key not in _OF_ITS_WRITER}}


def compare_tokenizers(source: Path, folder: Path, out: Path) -> None:
    """Warn where transformers makes another tokenizer of the files of `source` beside the config.json in `folder`.

    For some model types (qwen2) it takes a class of its own choice, whatever tokenizer_config.json says.
    `out`: the name to tell.
    """
    ours, theirs = _load(source), _load(folder)
    if ours.backend_tokenizer.to_str() != theirs.backend_tokenizer.to_str():
        _log.warning(
            "transformers' AutoTokenizer reads %s as %s, with other token ids than the tokenizer of training: "
            "load it with PreTrainedTokenizerFast.from_pretrained",
            out, type(theirs).__name__,
        )  # fmt: skip


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
