"""Small sets of documents for tests: in memory, and prepared on disk from token lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.manifest import Manifest, save_manifest
from data.store import TokenStore
from data.writer import ShardWriter, write_split


class MemoryDocuments:
    """Documents of given lengths whose tokens are all different: token t of the stream is t + 1."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.num_docs, self.num_tokens = len(lengths), sum(lengths)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.doc_of = np.repeat(np.arange(len(lengths)), lengths)

    def doc(self, i: int) -> np.ndarray:
        return np.arange(self.offsets[i], self.offsets[i + 1]) + 1

    def loss(self, i: int) -> np.ndarray | None:
        return None


def write_store(
    folder: Path,
    docs: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]] = (),
    *,
    shard_tokens: int = 64,
    loss: Sequence[Sequence[float]] | None = None,
) -> TokenStore:
    """A prepared set of these token lists (names `doc-0`, `doc-1`, ...), opened at its train split.

    `loss`: masks of `docs` (all ones for `heldout`), or weights: some are neither 0 nor 1.
    """
    masked = loss is not None
    weighted = masked and any(value not in (0, 1) for one in loss or () for value in one)
    folder.mkdir(parents=True)
    splits, files = {}, {}
    for split, lists in (("train", docs), ("heldout", heldout)):
        shards = []
        writer, filled = ShardWriter(folder, f"{split}-00000.bin", np.dtype(np.uint16), masked, weighted), 0
        for i, ids in enumerate(lists):
            if filled >= shard_tokens:
                shards.append(writer.finish())
                name = f"{split}-{len(shards):05d}.bin"
                writer, filled = ShardWriter(folder, name, np.dtype(np.uint16), masked, weighted), 0
            writer.add(f"doc-{i}", ids, np.array(loss[i]) if loss is not None and split == "train" else None)
            filled += len(ids)
        splits[split], written = write_split(folder, split, [*shards, writer.finish()])
        files |= written
    manifest = Manifest({}, "tokenizer-0", 1000, "uint16", splits, {}, files, masked=masked, weighted=weighted)
    save_manifest(manifest, folder)
    return TokenStore(folder, "train")
