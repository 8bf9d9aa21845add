"""Documents -> rows of a fixed length: any row is found without building the others.

Shape legend: S seq_len, P pieces of a row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from conf.constants import IGNORE_INDEX
from data.shuffle import hashes, key_of

MAX_OPEN = 4096  # rows that best-fit fills at a time
WINDOWS = 4  # of best-fit in an epoch, at least
PLANS = 8  # epochs with a packing of their own; the ninth has the first one's, with its rows in another order

Plan = dict[str, np.ndarray]


class Documents(Protocol):
    """What packing needs of a set of documents; `data.store.TokenStore` is one."""

    num_docs: int
    num_tokens: int
    offsets: np.ndarray

    def doc(self, i: int) -> np.ndarray: ...

    def loss(self, i: int) -> np.ndarray | None:
        """Of each token of document `i`: uint8, 1 where it is a target, or fp32, its weight; None: all count 1."""


class Pieces(NamedTuple):
    """What a row is made of, int64 [P] each: `size` tokens of document `doc` from its token `skip` on."""

    doc: np.ndarray
    skip: np.ndarray
    size: np.ndarray


class Packing(Protocol):
    """Rows by epoch and number. Every epoch has all documents; how many rows it takes may differ."""

    def find(self, number: int) -> tuple[int, int]:
        """(epoch, row in it) of the `number`-th row of an endless run over the epochs."""

    def rows_of(self, epoch: int) -> int:
        """Rows of an epoch."""

    def pieces(self, index: int, epoch: int, turn: int) -> Pieces:
        """Row `index` of `epoch`; `turn` is any number that changes with the epoch."""


@dataclass(frozen=True)
class Row:
    """One packed row, int64 [S] each, weights fp32 [S] or None. See `data.batch.Batch` for the meaning."""

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    weights: np.ndarray | None = None


def build_row(
    documents: Documents, pieces: Pieces, seq_len: int, pad_id: int = 0, loss_weight: float = 1.0
) -> Row:
    """The row: positions restart at each piece; what remains is padding, without labels, a piece of its own.

    The label of a piece's last token is the document's next token, if it has one: no target is lost by a cut.
    Tokens that the document's loss mask leaves out, or that weigh nothing, are no labels. `loss_weight` is a
    factor on all weights; rows without weights have none as long as it is 1.
    """
    weights: np.ndarray | None = None
    input_ids = np.full(seq_len, pad_id, dtype=np.int64)
    labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
    positions = np.arange(seq_len, dtype=np.int64)
    filled = 0
    for doc, skip, size in zip(*(values.tolist() for values in pieces), strict=True):
        tokens = documents.doc(doc)[skip : skip + size + 1]
        end, targets = filled + size, len(tokens) - 1
        input_ids[filled:end] = tokens[:size]
        labels[filled : filled + targets] = tokens[1:]
        if (loss := documents.loss(doc)) is not None:
            own = loss[skip + 1 : skip + 1 + targets]
            labels[filled : filled + targets][own == 0] = IGNORE_INDEX
            if own.dtype == np.float32:
                weights = np.zeros(seq_len, dtype=np.float32) if weights is None else weights
                weights[filled : filled + targets] = own
        positions[filled:end] -= filled
        filled = end
    positions[filled:] -= filled
    if loss_weight != 1.0:
        counted = (labels != IGNORE_INDEX) if weights is None else weights
        weights = np.float32(loss_weight) * counted.astype(np.float32)
    return Row(input_ids, labels, positions, weights)


class ConcatPacking:
    """Concatenate and split: the documents laid end to end and cut every `seq_len` tokens.

    An epoch is `num_rows` rows that hold every token exactly once; the last one may end in padding. Each epoch
    begins the circle of documents at another one, so that the cuts fall elsewhere. A document longer than a row is
    split, and its pieces do not see each other.
    """

    def __init__(self, documents: Documents, seq_len: int, pad_id: int = 0) -> None:
        self.documents, self.seq_len, self.pad_id = documents, seq_len, pad_id
        self.num_rows = -(-documents.num_tokens // seq_len)

    def find(self, number: int) -> tuple[int, int]:
        """See `Packing`. O(1)."""
        return divmod(number, self.num_rows)

    def rows_of(self, epoch: int) -> int:
        """The same in every epoch."""
        return self.num_rows

    def pieces(self, index: int, epoch: int = 0, turn: int = 0) -> Pieces:
        """Row `index` of the epoch that starts with document `turn` (modulo their number). O(log num_docs + P)."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        docs = self.documents
        at = (index * self.seq_len + int(docs.offsets[turn % docs.num_docs])) % docs.num_tokens
        left = min(self.seq_len, docs.num_tokens - index * self.seq_len)
        doc = int(np.searchsorted(docs.offsets, at, side="right")) - 1
        found: list[tuple[int, int, int]] = []
        while left:
            start = int(docs.offsets[doc])
            size = min(int(docs.offsets[doc + 1]) - at, left)
            found.append((doc, at - start, size))
            left -= size
            doc = (doc + 1) % docs.num_docs
            at = int(docs.offsets[doc])
        return Pieces(*np.array(found, dtype=np.int64).T)

    def row(self, index: int, turn: int = 0) -> Row:
        """See `pieces` and `build_row`."""
        return build_row(self.documents, self.pieces(index, 0, turn), self.seq_len, self.pad_id)


class PlannedPacking:
    """Rows from tables made beforehand by `best_fit`, one for each epoch; behind the last the first comes again.

    `plans`: row_starts int64 [rows + 1], and doc, skip, size int64 [all pieces], of each.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans
        self._rows = [len(plan["row_starts"]) - 1 for plan in plans]
        self._starts = np.cumsum([0, *self._rows]).tolist()

    def find(self, number: int) -> tuple[int, int]:
        """See `Packing`. O(log of the number of plans)."""
        cycle, at = divmod(number, self._starts[-1])
        plan = bisect_right(self._starts, at) - 1
        return cycle * len(self._plans) + plan, at - self._starts[plan]

    def rows_of(self, epoch: int) -> int:
        """Of its plan."""
        return self._rows[epoch % len(self._plans)]

    def pieces(self, index: int, epoch: int = 0, turn: int = 0) -> Pieces:
        """Row `index`. O(P)."""
        if not 0 <= index < self.rows_of(epoch):
            raise IndexError(f"row {index} of {self.rows_of(epoch)}")
        plan = self._plans[epoch % len(self._plans)]
        start, end = plan["row_starts"][index : index + 2].tolist()
        return Pieces(*(plan[name][start:end] for name in Pieces._fields))


def best_fit(lengths: np.ndarray, seq_len: int, window: int, epoch: int = 0) -> Plan:
    """Pack whole documents: each goes where it leaves the least room, the longest of `window` documents first.

    A document above `seq_len` gives full rows of its own and a rest that is packed. Rows left open by one window
    are filled by the next. Each epoch takes the documents in an order of its own, in at least WINDOWS windows, so
    that a document has other neighbours: a tenth of the old ones at 2,000 documents, fewer in larger sets. Time
    and memory O(documents), about a second for a million; done once (see `data.view`).

    Args:
        lengths: int64 [num_docs], at least 1.
    Returns:
        The plan for `PlannedPacking`.
    """
    window = max(1, min(window, -(-len(lengths) // WINDOWS)))
    docs = np.argsort(hashes(len(lengths), key_of("best_fit", epoch)), kind="stable")
    lengths = lengths[docs]
    full = lengths // seq_len
    full_doc = np.repeat(docs, full)
    nth = np.arange(len(full_doc)) - np.repeat(np.cumsum(full) - full, full)
    with_rest = lengths % seq_len > 0
    rest_doc, rest = docs[with_rest], (lengths % seq_len)[with_rest]
    row_of = _fit(rest, seq_len, window)
    order = np.argsort(row_of, kind="stable")
    num_rests = np.bincount(row_of) if len(row_of) else np.zeros(0, np.int64)
    rows = np.concatenate([np.ones(len(full_doc), np.int64), num_rests])
    return {
        "row_starts": np.concatenate([[0], np.cumsum(rows)]).astype(np.int64),
        "doc": np.concatenate([full_doc, rest_doc[order]]).astype(np.int64),
        "skip": np.concatenate([nth * seq_len, (full * seq_len)[with_rest][order]]).astype(np.int64),
        "size": np.concatenate([np.full(len(full_doc), seq_len), rest[order]]).astype(np.int64),
    }


def _fit(sizes: np.ndarray, seq_len: int, window: int) -> np.ndarray:
    """The row of each piece, int64, rows numbered as they are opened."""
    row_of = np.zeros(len(sizes), dtype=np.int64)
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    opened = 0
    for start in range(0, len(sizes), window):
        here = sizes[start : start + window]
        longest_first = np.argsort(-here, kind="stable")
        for piece, size in zip((longest_first + start).tolist(), here[longest_first].tolist(), strict=True):
            place = bisect_left(room, (size, 0))
            if place < len(room):
                free, row = room.pop(place)
            else:
                free, row = seq_len, opened
                opened += 1
            row_of[piece] = row
            if free > size:
                insort(room, (free - size, row))
        del room[:-MAX_OPEN]  # the fullest rows are closed
    return row_of
