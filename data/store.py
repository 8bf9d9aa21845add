"""Reading of a prepared set: memory-mapped tokens and documents by number."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from conf.checksums import check_hashes, check_sizes
from conf.errors import UserError
from data.manifest import REMEDY, SPLITS, load_manifest
from data.writer import LOSS_SUFFIX, loss_dtype


def _load(path: Path) -> np.ndarray:
    """A table, memory-mapped. Raises UserError where its header is damaged."""
    try:
        table: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:80]}); {REMEDY}") from error
    return table


class TokenStore:
    """Documents of one split. Nothing is read ahead: memory does not grow with the set.

    Documents have a fixed order that is unrelated to their source (see `data.writer`); laid end to end in it
    they form one stream of `num_tokens` tokens, of which `offsets` are the borders.

    Raises UserError if the folder is no complete set, a file is missing or has the wrong size, or the split
    is empty.
    """

    def __init__(self, path: Path, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {SPLITS}")
        self.path, self.split = Path(path), split
        self.manifest = load_manifest(self.path)
        check_sizes(self.path, self.manifest.expected, REMEDY)
        info = self.manifest.splits[split]
        if info.documents == 0:
            raise UserError(f"{self.path} has no {split} documents; prepare it with another `heldout` share")
        self.num_docs, self.num_tokens = info.documents, info.tokens
        self.vocab_size, self.tokenizer_fingerprint = self.manifest.vocab_size, self.manifest.tokenizer_fingerprint
        self.offsets: np.ndarray = _load(self.path / f"{split}-offsets.npy")
        """int64 [num_docs + 1], borders of the documents in the stream."""
        self._starts: np.ndarray = _load(self.path / f"{split}-starts.npy")
        if len(self.offsets) != self.num_docs + 1 or int(self.offsets[-1]) != self.num_tokens:
            raise UserError(f"{self.path}/{split}-offsets.npy does not fit the manifest; prepare the set anew")
        self._names, self._opened = list(info.shards), dict[str, np.ndarray]()
        self._dtype = np.dtype(self.manifest.dtype)
        self._borders = np.cumsum([0, *info.shards.values()])

    def __len__(self) -> int:
        return self.num_docs

    def doc_length(self, i: int) -> int:
        """Tokens of document `i`, its eos included."""
        return int(self.offsets[i + 1] - self.offsets[i])

    def doc(self, i: int) -> np.ndarray:
        """Tokens of document `i` as a read-only view, uint16 or uint32 [doc_length(i)]. O(log shards)."""
        return self._view(i, "", self._dtype)

    def loss(self, i: int) -> np.ndarray | None:
        """Of each token of document `i` [doc_length(i)]: uint8, 1 where it is a target of training, or fp32, its
        weight in the loss; None: all are targets and weigh 1."""
        if not (self.masked or self.weighted):
            return None
        return self._view(i, LOSS_SUFFIX, loss_dtype(self.weighted))

    @property
    def masked(self) -> bool:
        """Whether parts of documents are no targets: such documents are trained on whole, or not at all."""
        return self.manifest.masked

    @property
    def weighted(self) -> bool:
        """Whether tokens have weights in the loss."""
        return self.manifest.weighted

    def _view(self, i: int, suffix: str, dtype: np.dtype) -> np.ndarray:
        start = int(self._starts[i])
        shard = int(np.searchsorted(self._borders, start, side="right")) - 1
        local, name = start - int(self._borders[shard]), self._names[shard] + suffix
        if name not in self._opened:
            self._opened[name] = np.memmap(self.path / name, dtype=dtype, mode="r")
        return self._opened[name][local : local + self.doc_length(i)]

    @property
    def tokenizer_path(self) -> Path:
        """The Hugging Face tokenizer folder the set was made with."""
        return self.path / "tokenizer"

    @property
    def fingerprint(self) -> str:
        """sha256 over the checksums of this split's files and the tokenizer: equal content, equal fingerprint."""
        files = {n: f.sha256 for n, f in self.manifest.files.items() if n.startswith(f"{self.split}-")}
        parts = [self.manifest.dtype, self.tokenizer_fingerprint, files]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Compare every file with its checksum; UserError names one that differs. Reads everything."""
        check_hashes(self.path, self.manifest.expected, REMEDY)
