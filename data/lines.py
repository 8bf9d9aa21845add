"""Lines of text files, compressed or not."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from conf.errors import UserError


def read_lines(path: Path, start: int = 0, stop: int = 0) -> Iterator[bytes]:
    """The lines of a plain, .gz or .zst file, or those between two offsets in its text, if `stop` is given.

    An archive is unpacked up to `start` for that. Raises UserError if it is damaged or ends early.
    """
    with _told(path), contextlib.closing(_open(path)) as lines:
        lines.seek(start)
        left = stop - start
        for line in lines:
            yield line
            left -= len(line)
            if stop and left <= 0:
                return


def read_chunks(path: Path, size: int = 1 << 22) -> Iterator[bytes]:
    """The text of a plain, .gz or .zst file in pieces of about `size` bytes. Raises as `read_lines`."""
    with _told(path), contextlib.closing(_open(path)) as file:
        if isinstance(file, _ZstdLines):
            yield from file.blocks()
            return
        while chunk := file.read(size):
            yield chunk


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged archive ({str(error).rstrip('.')}); make it anew") from error


def _open(path: Path) -> gzip.GzipFile | BufferedReader | _ZstdLines:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return _ZstdLines(path)
    return path.open("rb")


class _ZstdLines:
    """Lines of a .zst file. A stream that ends inside a frame is an EOFError: zstandard itself says nothing."""

    def __init__(self, path: Path) -> None:
        self._file, self._start = path.open("rb"), 0

    def close(self) -> None:
        self._file.close()

    def seek(self, offset: int) -> None:
        """Where to begin; before reading."""
        self._start = offset

    def __iter__(self) -> Iterator[bytes]:
        rest, before = b"", self._start
        for block in self.blocks():
            if before >= len(block):
                before -= len(block)
                continue
            block, before = block[before:], 0
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest

    def blocks(self) -> Iterator[bytes]:
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
