"""Small sets of documents for tests: in memory, and prepared on disk from token lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.manifest import Manifest, save_manifest
from data.store import TokenStore
from data.writer import SplitWriter


class MemoryDocuments:
    """Documents of given lengths whose tokens are all different: token t of the stream is t + 1."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.num_docs, self.num_tokens = len(lengths), sum(lengths)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.doc_of = np.repeat(np.arange(len(lengths)), lengths)

    def doc(self, i: int) -> np.ndarray:
        return np.arange(self.offsets[i], self.offsets[i + 1]) + 1


def write_store(
    folder: Path, docs: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]] = (), *, shard_tokens: int = 64
) -> TokenStore:
    """A prepared set of these token lists (names `doc-0`, `doc-1`, ...), opened at its train split."""
    folder.mkdir(parents=True)
    splits, files = {}, {}
    for split, lists in (("train", docs), ("heldout", heldout)):
        writer = SplitWriter(folder, split, np.dtype(np.uint16), shard_tokens)
        for i, ids in enumerate(lists):
            writer.add(f"doc-{i}", ids)
        splits[split] = writer.finish()
        files |= writer.files
    save_manifest(Manifest({}, "tokenizer-0", 1000, "uint16", splits, {}, files), folder)
    return TokenStore(folder, "train")
