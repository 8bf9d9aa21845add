"""`manifest.json` of a prepared set: what it holds, how it was made, and a checksum for every file.

It is written last, into a folder that gets its final name by one rename: a folder with a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.checksums import Expected
from conf.errors import UserError

MANIFEST_FILE = "manifest.json"
REMEDY = "prepare the set anew"
VERSION = 1
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class SplitInfo:
    """One split. `shards` maps file name to tokens; `length_histogram` maps a power of two n to the number
    of documents with more than n / 2 and at most n tokens."""

    documents: int
    tokens: int
    longest: int
    shards: dict[str, int]
    length_histogram: dict[str, int]


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a reader must know. `settings` are the ones that decide the content; `skipped` counts the
    records that could not be used by reason (places are in `skipped.jsonl`); beside every shard, `masked` sets
    have a loss mask and `weighted` ones weights; `source` tells what was read (see `data.origin`), its files are
    in `source.jsonl`."""

    settings: dict[str, Any]
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    splits: dict[str, SplitInfo]
    skipped: dict[str, int]
    files: dict[str, FileInfo] = field(default_factory=dict)
    version: int = VERSION
    masked: bool = False
    weighted: bool = False
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def expected(self) -> Expected:
        """What `conf.checksums` compares the files with."""
        return {name: (info.bytes, info.sha256) for name, info in self.files.items()}


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` and make it durable."""
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared set; UserError if the folder is not one."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared data set (no {MANIFEST_FILE}); make one with `moba prepare`")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise UserError(f"{path}: version {raw['version']}, but {VERSION} is read here; prepare the set anew")
        raw["splits"] = {name: SplitInfo(**split) for name, split in raw["splits"].items()}
        raw["files"] = {name: FileInfo(**info) for name, info in raw["files"].items()}
        return Manifest(**raw)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the set anew") from error
