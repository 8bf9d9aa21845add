"""A set that is there already: whether it is the one asked for."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import ReadConfig, SyntheticConfig, TokenizerConfig
from data.manifest import MANIFEST_FILE, Manifest, load_manifest
from data.origin import changes
from data.sources import list_files

log = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"


def settings_of(
    source: str, heldout: float, tokenizer: TokenizerConfig, read: ReadConfig, synthetic: SyntheticConfig
) -> dict[str, Any]:
    """What decides the content. Of `read` and `synthetic`, what differs from the defaults."""
    settings: dict[str, Any] = {"source": source, "heldout": heldout}
    if tokenizer.path:
        settings["tokenizer.path"] = tokenizer.path
    else:
        settings["tokenizer.train_vocab_size"] = tokenizer.train_vocab_size
        settings["tokenizer.train_chars"] = tokenizer.train_chars
    for name, config, default in (("read", read, ReadConfig()), ("synthetic", synthetic, SyntheticConfig())):
        for key, value in dataclasses.asdict(config).items():
            if value != getattr(default, key) and key != "on_error":
                settings[f"{name}.{key}"] = value
    return settings


def existing(out: Path, settings: dict[str, Any], read: ReadConfig) -> Manifest | None:
    """The manifest of a complete `out`; None if there is nothing yet. UserError if `out` is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(f"{out} exists and is not a prepared data set; choose another `out`")
    manifest = load_manifest(out)
    keys = sorted(settings.keys() | manifest.settings.keys())
    differ = [
        f"{key} was {manifest.settings.get(key, 'not given')}, now {settings.get(key, 'not given')}"
        for key in keys
        if settings.get(key) != manifest.settings.get(key)
    ]
    if differ:
        raise UserError(f"{out} was prepared with other settings ({'; '.join(differ)}); choose another `out`")
    if read.on_error == "fatal" and manifest.skipped:
        count = sum(manifest.skipped.values())
        raise UserError(f"{out} was prepared with {count} bad records skipped (see {out / SKIPPED_FILE}), which "
                        "read.on_error=fatal forbids; repair the source and choose another `out`")  # fmt: skip
    return manifest


def warn_if_changed(out: Path, source: str, read: ReadConfig, synthetic: SyntheticConfig) -> None:
    """Tell if the source is not as it was when the set was made."""
    try:
        differ = changes(list_files(source, read, synthetic), out)
    except UserError:
        return  # the source is gone, and not needed any more
    if differ:
        log.warning(
            "%s was made from another state of %s: %s; it is used as it is (delete it to make it anew)",
            out, source, differ,
        )  # fmt: skip
