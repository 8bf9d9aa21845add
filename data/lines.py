"""Lines of text files, compressed or not."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from conf.errors import UserError


def read_lines(path: Path, start: int = 0, stop: int = 0) -> Iterator[bytes]:
    """The lines of a plain, .gz or .zst file; of a plain one those between two byte offsets, if `stop` is given.

    Raises UserError if the archive is damaged or ends early.
    """
    try:
        with contextlib.closing(_open(path)) as lines:
            lines.seek(start)
            left = stop - start
            for line in lines:
                yield line
                left -= len(line)
                if stop and left <= 0:
                    return
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged archive ({str(error).rstrip('.')}); make it anew") from error


class _Lines(Protocol):
    def __iter__(self) -> Iterator[bytes]: ...

    def seek(self, offset: int, /) -> object: ...

    def close(self) -> None: ...


def _open(path: Path) -> _Lines:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return _ZstdLines(path)
    return path.open("rb")


class _ZstdLines:
    """Lines of a .zst file. A stream that ends inside a frame is an EOFError: zstandard itself says nothing."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def close(self) -> None:
        self._file.close()

    def seek(self, offset: int) -> None:
        assert offset == 0

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        for block in self._blocks():
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest

    def _blocks(self) -> Iterator[bytes]:
        import zstandard

        inside, decoder = False, zstandard.ZstdDecompressor().decompressobj()
        try:
            while data := self._file.read(1 << 18):
                while data:
                    inside = True
                    yield decoder.decompress(data)
                    data = decoder.unused_data
                    if decoder.eof:
                        inside, decoder = False, zstandard.ZstdDecompressor().decompressobj()
                    else:
                        data = b""
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        if inside:
            raise EOFError("it ends inside a frame")
