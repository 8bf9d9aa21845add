"""Where large files of records can be entered in the middle, with the number of the record found there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data.lines import read_chunks


def cut_jsonl(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """(first byte, end, number of the first line) of stretches of whole lines, of at least `size` bytes each.

    Of an archive, bytes of its text.
    """
    start, line, first, at = 0, 1, 1, 0
    for chunk in read_chunks(path):
        end = chunk.find(b"\n", max(0, start + size - at - 1)) if start + size <= at + len(chunk) else -1
        seen = 0
        while end >= 0:
            line += chunk.count(b"\n", seen, end + 1)
            seen = end + 1
            yield start, at + seen, first
            start, first = at + seen, line
            wanted = seen + size - 1
            end = chunk.find(b"\n", wanted) if wanted < len(chunk) else -1
        line += chunk.count(b"\n", seen)
        at += len(chunk)
    if start < at:
        yield start, at, first


def cut_parquet(path: Path, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row group, end, number of the first row, bytes) of stretches of row groups, of at least `size` bytes
    each as far as there are so many. Raises UserError if the file cannot be read."""
    metadata = parquet_file(path).metadata
    start, first, row, total = 0, 1, 1, 0
    for group in range(metadata.num_row_groups):
        total += metadata.row_group(group).total_byte_size
        row += metadata.row_group(group).num_rows
        if total >= size or group == metadata.num_row_groups - 1:
            yield start, group + 1, first, total
            start, first, total = group + 1, row, 0


def parquet_file(path: Path) -> Any:
    """The open `pyarrow.parquet.ParquetFile`."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
