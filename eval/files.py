"""Small files written whole or not at all: JSON results and appended JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; a reader (or a kill) sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: JSON has no word for them."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and hand it to the disk before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of `path`, one a line; nothing if it does not exist.

    A last line without its newline was cut by a kill while it was being appended: it is left out.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip():
                yield json.loads(line)


def drop_torn_line(path: Path) -> None:
    """Cut an unfinished last line off, so that the next append starts on a line of its own."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            write_atomic(path, content[: content.rfind(b"\n") + 1])
