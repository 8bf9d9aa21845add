"""What a set was made from: the list of source files, to notice later that they changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.sources import SourceFile

SOURCE_FILE = "source.jsonl"


def describe(files: Sequence[SourceFile]) -> dict[str, Any]:
    """Number of files, bytes, and a sha256 over names, sizes and modification times."""
    digest = hashlib.sha256()
    for file in files:
        digest.update((json.dumps(_row(file)) + "\n").encode())
    return {"files": len(files), "bytes": sum(f.bytes for f in files), "fingerprint": digest.hexdigest()}


def save_list(files: Sequence[SourceFile], folder: Path) -> None:
    with (folder / SOURCE_FILE).open("w", encoding="utf-8") as out:
        for file in files:
            out.write(json.dumps(_row(file)) + "\n")


def changes(files: Sequence[SourceFile], folder: Path) -> str:
    """How `files` differ from those the set in `folder` was made from, in words; empty if they do not."""
    try:
        lines = (folder / SOURCE_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""  # a set made before source files were recorded
    before = {row[0]: row[1:] for row in map(json.loads, lines)}
    now = {row[0]: row[1:] for row in map(_row, files)}
    parts = {
        "changed": [name for name in now if name in before and now[name] != before[name]],
        "added": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
    }
    return ", ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in parts.items() if names)


def _row(file: SourceFile) -> list[Any]:
    return [file.name.encode("utf-8", "replace").decode(), file.bytes, file.mtime_ns]
