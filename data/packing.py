"""Documents -> rows of a fixed length, by index arithmetic: any row is found without building the others.

Shape legend: S seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from conf.constants import IGNORE_INDEX


class Documents(Protocol):
    """What packing needs of a set of documents; `data.store.TokenStore` is one."""

    num_docs: int
    num_tokens: int
    offsets: np.ndarray

    def doc(self, i: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Row:
    """One packed row, int64 [S] each. See `data.batch.Batch` for the meaning."""

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray


class ConcatPacking:
    """Concatenate and split: the documents laid end to end and cut every `seq_len` tokens.

    An epoch is `num_rows` rows that hold every token exactly once; the last one may end in padding (`pad_id`,
    without labels, as a piece of its own). Each epoch begins the circle of documents at another one, so that the
    cuts fall elsewhere. Positions restart at each document and at each row: a document longer than a row
    is split, and its pieces do not see each other. A label may lie in the next row: no target is lost by a cut.
    """

    def __init__(self, documents: Documents, seq_len: int, pad_id: int = 0) -> None:
        self.documents, self.seq_len, self.pad_id = documents, seq_len, pad_id
        self.num_rows = -(-documents.num_tokens // seq_len)

    def row(self, index: int, first_doc: int = 0) -> Row:
        """Row `index` of the epoch that starts with document `first_doc`. O(log num_docs + S)."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        docs, seq_len = self.documents, self.seq_len
        input_ids = np.full(seq_len, self.pad_id, dtype=np.int64)
        labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
        positions = np.zeros(seq_len, dtype=np.int64)
        at = (index * seq_len + int(docs.offsets[first_doc])) % docs.num_tokens  # place in the stored stream
        real = min(seq_len, docs.num_tokens - index * seq_len)
        doc = int(np.searchsorted(docs.offsets, at, side="right")) - 1
        skip = at - int(docs.offsets[doc])  # tokens of this document that lie in earlier rows
        filled = 0
        while filled < real:
            tokens = docs.doc(doc)[skip : skip + real - filled + 1]  # one more: the label of the last
            size = min(len(tokens), real - filled)
            input_ids[filled : filled + size] = tokens[:size]
            labels[filled : filled + len(tokens) - 1] = tokens[1:]
            positions[filled : filled + size] = np.arange(size)
            filled += size
            doc, skip = (doc + 1) % docs.num_docs, 0
        positions[real:] = np.arange(seq_len - real)
        return Row(input_ids, labels, positions)
