import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.constants import IGNORE_INDEX
from data.batch import cu_seqlens_of
from data.packing import ConcatPacking
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
