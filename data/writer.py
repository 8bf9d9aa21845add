"""Writing of token shards in order of arrival, and of the index that gives documents their order.

Documents are read in the order of a hash of their names, not in the order of the source: neighbours in a packed
row are then unrelated, wherever they came from. Only the index is sorted; tokens stay where they were written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from conf.checksums import sha256_file
from data.manifest import FileInfo, SplitInfo

LOSS_SUFFIX = ".loss"


def hash_of_name(name: str) -> tuple[int, int]:
    """Two independent 64-bit hashes of a document's name: one picks the split, the other the place in it."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def is_heldout(name: str, share: float) -> bool:
    """Whether a document belongs to the held-out split. Adding documents never moves another one."""
    return hash_of_name(name)[0] < int(share * 2**64)


@dataclass(frozen=True)
class Shard:
    """A finished shard: its files, and of each document the place in the order (uint64) and the tokens (int64)."""

    name: str
    tokens: int
    files: dict[str, FileInfo]
    order: np.ndarray
    lengths: np.ndarray


def loss_dtype(weighted: bool) -> np.dtype:
    """Of the files beside the shards: a mask, or the weights of the tokens in the loss."""
    return np.dtype(np.float32 if weighted else np.uint8)


class ShardWriter:
    """Appends documents to `<name>` in `folder` and, if `masked` or `weighted`, which of their tokens are targets
    (uint8), or how much these weigh (fp32), to `<name>.loss`. Without documents there is no file."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, masked: bool = False, weighted: bool = False
    ) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._loss_dtype = loss_dtype(weighted) if masked or weighted else None
        self._outputs: dict[str, _Output] = {}
        self._order: list[int] = []
        self._lengths: list[int] = []

    def add(self, name: str, ids: Sequence[int] | np.ndarray, loss: np.ndarray | None = None) -> None:
        """Append one document (its eos included)."""
        self._append(self._name, np.asarray(ids, dtype=self._dtype))
        if self._loss_dtype is not None:
            given = np.ones(len(ids)) if loss is None else loss
            self._append(self._name + LOSS_SUFFIX, given.astype(self._loss_dtype))
        self._order.append(hash_of_name(name)[1])
        self._lengths.append(len(ids))

    def finish(self) -> Shard:
        """Close the files, durably."""
        files = {name: output.finish() for name, output in self._outputs.items()}
        order, lengths = np.array(self._order, dtype=np.uint64), np.array(self._lengths, dtype=np.int64)
        return Shard(self._name, int(lengths.sum()), files, order, lengths)

    def abort(self) -> None:
        """Close without finishing; a no-op after `finish`."""
        for output in self._outputs.values():
            output.file.close()

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self._outputs:
            self._outputs[name] = _Output(self._folder / name)
        self._outputs[name].write(values.tobytes())


class _Output:
    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")
        self._sha, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._sha.update(data)
        self._bytes += len(data)

    def finish(self) -> FileInfo:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return FileInfo(self._bytes, self._sha.hexdigest())


def write_split(folder: Path, split: str, shards: Sequence[Shard]) -> tuple[SplitInfo, dict[str, FileInfo]]:
    """Write the index over the shards of a split, in this order; returns what the manifest says of it."""
    shards = [shard for shard in shards if len(shard.lengths)]
    files = {name: info for shard in shards for name, info in shard.files.items()}
    lengths = np.concatenate([np.zeros(0, np.int64), *(shard.lengths for shard in shards)])
    if lengths.size:
        order = np.argsort(np.concatenate([shard.order for shard in shards]), kind="stable")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])[order]
        offsets = np.concatenate([[0], np.cumsum(lengths[order])])
        for kind, values in (("starts", starts), ("offsets", offsets)):
            name = f"{split}-{kind}.npy"
            files[name] = _save(folder / name, values.astype(np.int64))
    powers, counts = np.unique(np.frexp(lengths - 0.5)[1], return_counts=True)
    histogram = {str(1 << int(k)): int(n) for k, n in zip(powers, counts, strict=True)}
    info = SplitInfo(
        documents=int(lengths.size),
        tokens=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        shards={shard.name: shard.tokens for shard in shards},
        length_histogram=histogram,
    )
    return info, files


def _save(path: Path, values: np.ndarray) -> FileInfo:
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(path.stat().st_size, sha256_file(path))
