"""Writing of one split: token shards in order of arrival, and the index that gives documents their order.

Documents are read in the order of a hash of their names, not in the order of the source: neighbours in a packed
row are then unrelated, wherever they came from. Only the index is sorted; tokens stay where they were written.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.manifest import FileInfo, SplitInfo, sha256_of

SHARD_TOKENS = 1 << 27  # a shard is closed at this size; one document is never cut


def hash_of_name(name: str) -> tuple[int, int]:
    """Two independent 64-bit hashes of a document's name: one picks the split, the other the place in it."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def is_heldout(name: str, share: float) -> bool:
    """Whether a document belongs to the held-out split. Adding documents never moves another one."""
    return hash_of_name(name)[0] < int(share * 2**64)


class SplitWriter:
    """Appends documents of one split to shards in `folder`."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.files: dict[str, FileInfo] = {}
        self._shards: dict[str, int] = {}
        self._order: list[int] = []
        self._lengths: list[int] = []
        self._file: BinaryIO | None = None
        self._sha = hashlib.sha256()
        self._in_shard = 0

    def add(self, name: str, ids: Sequence[int]) -> None:
        """Append one document (its eos included)."""
        if self._file is None:
            self._file = (self.folder / f"{self.split}-{len(self._shards):05d}.bin").open("wb")
            self._sha, self._in_shard = hashlib.sha256(), 0
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._sha.update(data)
        self._in_shard += len(ids)
        self._order.append(hash_of_name(name)[1])
        self._lengths.append(len(ids))
        if self._in_shard >= self.shard_tokens:
            self._close_shard()

    def finish(self) -> SplitInfo:
        """Close the last shard and write the index; `files` is complete afterwards."""
        self._close_shard()
        lengths = np.array(self._lengths, dtype=np.int64)
        if lengths.size:
            order = np.argsort(np.array(self._order, dtype=np.uint64), kind="stable")
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])[order]
            self._save_index("starts", starts.astype(np.int64))
            self._save_index("offsets", np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64))
        buckets = Counter((length - 1).bit_length() for length in self._lengths)
        return SplitInfo(
            documents=int(lengths.size),
            tokens=int(lengths.sum()),
            longest=int(lengths.max(initial=0)),
            shards=dict(self._shards),
            length_histogram={str(1 << k): buckets[k] for k in sorted(buckets)},
        )

    def abort(self) -> None:
        """Close without finishing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        name = Path(self._file.name).name
        self._shards[name] = self._in_shard
        self.files[name] = FileInfo(self._in_shard * self.dtype.itemsize, self._sha.hexdigest())
        self._file = None

    def _save_index(self, kind: str, values: np.ndarray) -> None:
        path = self.folder / f"{self.split}-{kind}.npy"
        with path.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        self.files[path.name] = FileInfo(path.stat().st_size, sha256_of(path))
