"""Files that survive a power cut: written whole, flushed to the disk, described by size and SHA-256."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_durably(root: Path, name: str, data: bytes) -> dict[str, dict[str, object]]:
    """Write `root/name` and flush it to the disk; returns its manifest entry `{name: {"bytes", "sha256"}}`.

    The checksum is of the bytes in memory, so that a disk which stores something else is found at load.
    """
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {name: {"bytes": len(data), "sha256": sha256(data)}}


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries (new files, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Delete `path` so that no half-deleted folder ever carries its name."""
    if not path.exists():
        return
    hidden = path if path.name.startswith(".tmp-") else path.with_name(f".tmp-removed-{path.name}")
    if hidden != path:
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
    shutil.rmtree(hidden)


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file in one step: readers see the old or the new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    write_durably(temporary.parent, temporary.name, text.encode())
    temporary.replace(path)
    sync_folder(path.parent)
