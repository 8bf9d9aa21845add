"""Where text comes from: the standard library of the running Python, or files of text.

A source is a list of files in a fixed order; a file holds one document (.txt, .md, .py) or many (.jsonl with
a `text` field, .parquet with a `text` column). A record that cannot be used goes to `on_bad(place, reason)`:
none is dropped in silence, and none stops the rest.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError

STDLIB = "stdlib"
TEXT_FIELD = "text"
WHOLE_FILES = (".txt", ".md", ".py")
RECORD_FILES = (".jsonl", ".parquet")

OnBad = Callable[[str, str], None]


@dataclass(frozen=True)
class Document:
    """`name` is stable and unique within its source: the split and the order of documents derive from it."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    name: str
    path: Path


def list_files(source: str) -> list[SourceFile]:
    """The files of `source` (`stdlib`, a folder or one file), sorted by relative path.

    `stdlib` is every .py file of the running Python's standard library, its `test` packages included (they
    are a third to a half of the text, and the longest documents), installed packages excluded. In a folder,
    hidden files and folders are left out. Raises UserError if there is nothing to read.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "__pycache__"}
        found = [p for p in root.rglob("*.py") if skip.isdisjoint(p.relative_to(root).parts)]
    else:
        root = Path(source)
        suffixes = WHOLE_FILES + RECORD_FILES
        if root.is_file():
            if root.suffix not in suffixes:
                raise UserError(f"source {source}: unknown kind of file; use {', '.join(suffixes)}")
            return [SourceFile(root.name, root)]
        if not root.is_dir():
            raise UserError(f"source {source}: no such file or folder; use a path or `{STDLIB}`")
        found = [p for p in root.rglob("*") if p.suffix in suffixes and p.is_file() and not _hidden(p, root)]
        if not found:
            raise UserError(f"source {source}: holds no {', '.join(suffixes)} file")
    return sorted((SourceFile(p.relative_to(root).as_posix(), p) for p in found), key=lambda f: f.name)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def hash_order(files: Iterable[SourceFile]) -> list[SourceFile]:
    """The files in an order given by a hash of their names: a fair sample is any prefix of it."""
    return sorted(files, key=lambda f: hashlib.blake2b(f.name.encode("utf-8", "surrogateescape")).digest())


def read_documents(files: Iterable[SourceFile], on_bad: OnBad) -> Iterator[Document]:
    """All documents of `files`, in order. Line ends are kept as they are."""
    for file in files:
        if file.path.suffix == ".jsonl":
            yield from _read_jsonl(file, on_bad)
        elif file.path.suffix == ".parquet":
            yield from _read_parquet(file, on_bad)
        else:
            try:
                text = file.path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                on_bad(file.name, "not valid UTF-8")
                continue
            yield from _checked(file.name, text, on_bad)


def _checked(place: str, text: Any, on_bad: OnBad) -> Iterator[Document]:
    """The document, if `text` is a non-empty string that UTF-8 can express."""
    if not isinstance(text, str):
        on_bad(place, f"field `{TEXT_FIELD}` is missing or no string")
    elif not text:
        on_bad(place, "empty")
    elif not _encodable(text):
        on_bad(place, "not valid UTF-8")
    else:
        yield Document(place, text)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")  # a lone surrogate, e.g. from the JSON escape \ud800, has no UTF-8 form
    except UnicodeEncodeError:
        return False
    return True


def _read_jsonl(file: SourceFile, on_bad: OnBad) -> Iterator[Document]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file.name}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                on_bad(place, "not valid UTF-8")
            except json.JSONDecodeError:
                on_bad(place, "not valid JSON")
            else:
                yield from _checked(place, record.get(TEXT_FIELD) if isinstance(record, dict) else None, on_bad)


def _read_parquet(file: SourceFile, on_bad: OnBad) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(file.path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield from _checked(f"{file.name}:{number}", row.get(TEXT_FIELD), on_bad)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file.path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
