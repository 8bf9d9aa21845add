"""Files that survive a power cut: written whole, flushed to the disk, described by size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

PIECE = 1 << 22  # bytes written and hashed at a time; both let other threads run meanwhile
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}  # as the safetensors format has them


class SaveError(RuntimeError):
    """Something of the run could not be written (disk full, no permission). The checkpoints there are intact."""


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Make a failed write to `path` a SaveError of one line."""
    try:
        yield
    except OSError as caught:
        raise SaveError(f"{path} not written: {caught.strerror or caught}; make room and start again") from caught


def write_durably(root: Path, name: str, *parts: bytes | memoryview) -> dict[str, dict[str, object]]:
    """Write `root/name` and flush it to the disk; returns its manifest entry `{name: {"bytes", "sha256"}}`.

    The checksum is of the bytes in memory, so that a disk which stores something else is found at load.
    """
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), PIECE):
                piece = memoryview(part)[start : start + PIECE]
                digest.update(piece)
                size += len(piece)
                while len(piece):
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return {name: {"bytes": size, "sha256": digest.hexdigest()}}


def safetensors_parts(tensors: dict[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file as views of the tensors: header length, JSON header, raw values.

    safetensors itself would first make a copy of them all. CPU tensors of float dtypes, any shape, contiguous.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    values: list[bytes | memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        values.append(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8
    return [len(text).to_bytes(8, "little"), text, *values]


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
    """Replace a small text file in one step: readers see the old or the new one. Raises SaveError."""
    temporary = path.with_name(f".tmp-{path.name}")
    with telling(path):
        write_durably(temporary.parent, temporary.name, text.encode())
        temporary.replace(path)
        sync_folder(path.parent)
