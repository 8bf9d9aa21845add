"""Units of a source -> documents.

A record that cannot be used goes to `on_bad(place, reason)`: none is dropped in silence, and none stops the rest.
A file that cannot be read to its end (a damaged archive) is a UserError: how much is lost is not known.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.schema import ReadConfig
from data.cutting import parquet_file
from data.folder import Unfinished
from data.lines import read_lines
from data.sources import SourceFile, Unit, repository_files
from data.weights import message_weights, token_ids, token_weights

OnBad = Callable[[str, str], None]
Message = Mapping[str, str]

_SNIFF = 8192  # a file with a NUL byte in its first bytes is binary: git's rule
_UTF8_BYTES = 4  # of a character, at most


@dataclass(frozen=True)
class Document:
    """`name` is stable and unique within its source: the split and the order of documents derive from it.

    Plain text; or a conversation (`messages`, each with role and content); or `text` with an `answer` behind it,
    which alone carries loss; or token ids, int64 [n].

    `weights` in the loss: of the whole document, a single one; of each message; of each token, n. Empty: all 1.
    """

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    answer: str = ""
    ids: np.ndarray | None = None
    weights: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Characters, or tokens."""
        return len(self.plain) if self.ids is None else len(self.ids)

    @property
    def plain(self) -> str:
        """All of its text, without markup."""
        return "\n".join(m["content"] for m in self.messages) if self.messages else self.text + self.answer


def read_unit(unit: Unit, read: ReadConfig, on_bad: OnBad) -> Iterator[Document]:
    """The documents of one unit (synthetic ones excepted), in order. Line ends are kept as they are."""
    if unit.file.kind == "text":
        if (text := _read_text(unit.file.path, unit.file.name, read, on_bad)) is not None:
            yield from _checked(unit.file.name, text, read, on_bad)
    elif unit.file.kind == "repo":
        yield from _checked(unit.file.name, _repository(unit.file, read, on_bad), read, on_bad)
    else:
        records = {"jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow, "hub": _hub}[unit.file.kind]
        wanted = field_of(read)
        for place, record in records(unit, read, on_bad):
            fields = record if isinstance(record, Mapping) else {}
            yield from _checked(place, fields.get(wanted), read, on_bad, fields.get(read.weight))


def field_of(read: ReadConfig) -> str:
    return read.field or {"chat": "messages", "tokens": "input_ids"}.get(read.kind, "text")


def _checked(place: str, value: Any, read: ReadConfig, on_bad: OnBad, weight: Any = None) -> Iterator[Document]:
    """The document, if `value` (and its `weight`) can be used."""
    try:
        document = _document(place, value, read, weight)
        if not document.size:
            raise ValueError("empty")
        if document.size > read.max_chars:
            raise ValueError("longer than read.max_chars")
        document.plain.encode("utf-8")  # a lone surrogate, e.g. from the JSON escape \ud800, has no UTF-8 form
    except UnicodeEncodeError:
        on_bad(place, "not valid UTF-8")
    except ValueError as error:
        on_bad(place, str(error))
    else:
        yield document


def _document(place: str, value: Any, read: ReadConfig, weight: Any) -> Document:
    """ValueError, with the reason, if it is none."""
    if read.kind == "chat":
        return Document(place, messages=_messages(value), weights=message_weights(value, read.weight))
    if read.kind == "tokens":
        ids = token_ids(value, field_of(read))
        return Document(place, ids=ids, weights=token_weights(weight, len(ids)) if read.weight else ())
    if not isinstance(value, str):
        raise ValueError(f"field `{field_of(read)}` is missing or no string")
    return Document(place, value, weights=token_weights(weight, 1) if read.weight else ())


def _messages(value: Any) -> tuple[Message, ...]:
    """The conversation; ValueError if it is none, or the assistant says nothing in it."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("no list of messages")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role")
        if not isinstance(message.get("content"), str):
            raise ValueError("a message whose content is no string")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in value):
        raise ValueError("no answer of the assistant")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _read_text(path: Path, place: str, read: ReadConfig, on_bad: OnBad) -> str | None:
    if path.stat().st_size > read.max_chars * _UTF8_BYTES:
        on_bad(place, "longer than read.max_chars")
        return None
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        on_bad(place, "not valid UTF-8")
        return None


def _repository(file: SourceFile, read: ReadConfig, on_bad: OnBad) -> str:
    """The text files of a repository, each below a line with its path."""
    parts: list[str] = []
    for path in repository_files(file.path):
        name = path.relative_to(file.path).as_posix()
        with path.open("rb") as start:
            if b"\0" in start.read(_SNIFF):
                continue
        text = _read_text(path, f"{file.name}/{name}", read, on_bad)
        if text:
            parts.append(f"{name}:\n{text}" + ("" if text.endswith("\n") else "\n"))
    return "\n".join(parts)


def _jsonl(unit: Unit, read: ReadConfig, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_lines(unit.file.path, unit.start, unit.stop), unit.first):
        if not line.strip():
            continue
        place = f"{unit.file.name}:{number}"
        try:
            yield place, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            on_bad(place, "not valid UTF-8")
        except (json.JSONDecodeError, RecursionError):
            on_bad(place, "not valid JSON")


def _parquet(unit: Unit, read: ReadConfig, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    file = parquet_file(unit.file.path)
    columns = {"field": field_of(read)}
    if read.weight and read.kind != "chat":
        columns["weight"] = read.weight
    for key, column in columns.items():
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{unit.file.path}: has no column {column}; set read.{key} to one of {names}")
    groups = range(unit.start, unit.stop or file.num_row_groups)
    yield from _rows(unit, file.iter_batches(64, row_groups=list(groups), columns=list(columns.values())))


def _arrow(unit: Unit, read: ReadConfig, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Arrow files as `datasets` writes them (the stream format), or the file format."""
    import pyarrow

    with pyarrow.memory_map(str(unit.file.path)) as file:
        try:
            reader: Any = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            try:
                whole = pyarrow.ipc.open_file(file)
            except (OSError, ValueError) as error:
                raise UserError(f"{unit.file.path}: not a readable arrow file") from error
            reader = (whole.get_batch(i) for i in range(whole.num_record_batches))
        yield from _rows(unit, reader)


def _rows(unit: Unit, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    number = unit.first
    try:
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{unit.file.name}:{number}", row
                number += 1
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        if isinstance(error, UserError):
            raise
        raise UserError(f"{unit.file.path}: damaged at row {number} ({str(error).splitlines()[0]})") from error


def _hub(unit: Unit, read: ReadConfig, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Shard `start` of a streamed data set."""
    stream = _load_hub(unit.file, read)
    rows = iter(stream.shard(num_shards=stream.num_shards, index=unit.start))
    for number in itertools.count(1):
        place = f"{unit.file.name}:{unit.start}:{number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of many types: a damaged file, a type that does not fit, no network
            raise Unfinished(
                f"source hub:{place}: cannot be read ({_first_line(error)}); "
                "the same command goes on with what is finished"
            ) from error
        yield place, row


def hub_shards(file: SourceFile, read: ReadConfig) -> int:
    """Files the data set is made of; UserError if it cannot be opened."""
    return _load_hub(file, read).num_shards


def _load_hub(file: SourceFile, read: ReadConfig) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(file.name, read.subset or None, split=read.split, streaming=True)
    except Exception as error:  # of many types: not found, no network, unknown subset or split
        raise UserError(f"source hub:{file.name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
