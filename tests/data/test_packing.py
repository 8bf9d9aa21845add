import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.constants import IGNORE_INDEX
from data.batch import cu_seqlens_of
from data.packing import ConcatPacking, PlannedPacking, best_fit, build_row
from tests.data.build import MemoryDocuments

LENGTHS = st.lists(st.one_of(st.just(1), st.integers(1, 9), st.integers(20, 70)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=150)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), first=st.integers(0, 10**6))
def test_an_epoch_holds_each_token_once_with_its_label_and_position(
    lengths: list[int], seq_len: int, first: int
) -> None:
    docs = MemoryDocuments(lengths)
    packing = ConcatPacking(docs, seq_len, pad_id=0)
    first %= docs.num_docs
    rows = [packing.row(i, first) for i in range(packing.num_rows)]
    start = int(docs.offsets[first])
    stream = np.roll(np.arange(docs.num_tokens), -start) + 1
    seen = np.concatenate([row.input_ids for row in rows])
    assert np.array_equal(seen[: docs.num_tokens], stream)
    assert not seen[docs.num_tokens :].any()  # padding

    for number, row in enumerate(rows):
        assert row.input_ids.shape == row.labels.shape == row.positions.shape == (seq_len,)
        assert row.input_ids.dtype == row.labels.dtype == row.positions.dtype == np.int64
        assert row.positions[0] == 0
        for i, token in enumerate(row.input_ids):
            if token == 0:
                assert row.labels[i] == IGNORE_INDEX
                continue
            doc = docs.doc_of[token - 1]
            last_of_doc = token == docs.offsets[doc + 1]
            assert row.labels[i] == (IGNORE_INDEX if last_of_doc else token + 1)
            begins = i == 0 or docs.doc_of[row.input_ids[i - 1] - 1] != doc
            assert row.positions[i] == (0 if begins else row.positions[i - 1] + 1)
        real = min(seq_len, docs.num_tokens - number * seq_len)
        if real < seq_len:
            assert row.positions[real:].tolist() == list(range(seq_len - real))
        borders, longest = cu_seqlens_of(row.positions[None])
        assert borders[0] == 0 and borders[-1] == seq_len and (np.diff(borders) > 0).all()
        assert longest == row.positions.max() + 1


def test_labels_count_every_target_of_the_set_once() -> None:
    docs = MemoryDocuments([5, 1, 13, 2])
    packing = ConcatPacking(docs, 4)
    labels = np.concatenate([packing.row(i).labels for i in range(packing.num_rows)])
    assert (labels != IGNORE_INDEX).sum() == docs.num_tokens - docs.num_docs  # all but each document's first token


@settings(deadline=None, max_examples=150)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), window=st.integers(1, 30), epoch=st.integers(0, 9))
def test_best_fit_holds_each_token_once_and_cuts_only_what_is_too_long(
    lengths: list[int], seq_len: int, window: int, epoch: int
) -> None:
    docs = MemoryDocuments(lengths)
    packing = PlannedPacking([best_fit(np.array(lengths), seq_len, window, epoch)])
    seen: list[int] = []
    for index in range(packing.rows_of(0)):
        pieces = packing.pieces(index)
        assert 0 < pieces.size.sum() <= seq_len
        for doc, skip, size in zip(*pieces, strict=True):
            assert skip % seq_len == 0 and size == min(lengths[doc] - skip, seq_len)
        row = build_row(docs, pieces, seq_len)
        real = int(pieces.size.sum())
        assert not row.input_ids[real:].any() and (row.labels[real:] == IGNORE_INDEX).all()
        borders, _ = cu_seqlens_of(row.positions[None])
        assert np.diff(borders).tolist() == [*pieces.size, *([seq_len - real] if real < seq_len else [])]
        ends = docs.offsets[docs.doc_of[row.input_ids[:real] - 1] + 1]
        expected = np.where(row.input_ids[:real] < ends, row.input_ids[:real] + 1, IGNORE_INDEX)
        assert np.array_equal(row.labels[:real], expected)
        seen += row.input_ids[:real].tolist()
    assert sorted(seen) == list(range(1, docs.num_tokens + 1))


def test_best_fit_wastes_little_on_mixed_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths as of a mix of web text, code and books: log-normal around 600 tokens, a tenth far longer."""
    rng = np.random.default_rng(0)
    short, long = rng.lognormal(6.4, 1.1, 18_000), rng.lognormal(9.5, 1.0, 2_000)
    lengths = np.concatenate([short, long]).astype(np.int64) + 1
    rng.shuffle(lengths)
    for seq_len in (4096, 32_768):
        for what, used in (("long ones split", lengths), ("long ones dropped", lengths[lengths <= seq_len])):
            packing = PlannedPacking([best_fit(used, seq_len, 4096)])
            useful = used.sum() / (packing.rows_of(0) * seq_len)
            with capsys.disabled():
                print(f"\n  best_fit, {seq_len}, {what}: {useful:.2%} of {packing.rows_of(0)} rows useful", end="")
            assert useful >= 0.98


def test_masked_tokens_are_no_labels() -> None:
    class Masked(MemoryDocuments):
        def loss(self, i: int) -> np.ndarray:
            return np.arange(self.offsets[i], self.offsets[i + 1]) % 3 == 0

    docs = Masked([7, 12, 3])
    for packing in (ConcatPacking(docs, 8), PlannedPacking([best_fit(np.diff(docs.offsets), 8, 9)])):
        rows = [build_row(docs, packing.pieces(i), 8) for i in range(packing.rows_of(0))]
        labels = np.concatenate([row.labels for row in rows])
        targets = [t + 1 for t in range(docs.num_tokens) if t not in docs.offsets and t % 3 == 0]
        assert sorted(labels[labels != IGNORE_INDEX]) == targets


def test_every_epoch_has_a_packing_of_its_own() -> None:
    """Documents meet other documents, and no more room is lost."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.4, 1.1, 4000).astype(np.int64) + 1, 4096)
    packing = PlannedPacking([best_fit(lengths, 4096, 65_536, epoch) for epoch in range(3)])
    neighbours: list[set[tuple[int, int]]] = []
    for epoch in range(3):
        rows = [sorted(packing.pieces(i, epoch).doc.tolist()) for i in range(packing.rows_of(epoch))]
        assert sorted(doc for row in rows for doc in row) == list(range(len(lengths)))
        assert lengths.sum() / (packing.rows_of(epoch) * 4096) >= 0.99
        neighbours.append({(a, b) for row in rows for a in row for b in row if a < b})
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert len(neighbours[a] & neighbours[b]) < 0.1 * len(neighbours[a])


def test_rows_are_found_across_epochs_of_unequal_length() -> None:
    plans = [{"row_starts": np.arange(rows + 1), **dict.fromkeys(("doc", "skip", "size"), np.arange(rows))}
             for rows in (3, 5, 4)]  # fmt: skip
    packing, places = PlannedPacking(plans), []
    for epoch in range(7):  # behind the third plan the first one comes again
        places += [(epoch, row) for row in range((3, 5, 4)[epoch % 3])]
    assert [packing.find(number) for number in range(len(places))] == places
    assert packing.find(12 * 10**12 + 3) == (3 * 10**12 + 1, 0)
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            packing.pieces(bad, 1)
