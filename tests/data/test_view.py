from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from conf.schema import DomainRule
from data.view import PLANS_FOLDER, View, cached, is_plain, select
from tests.data.build import MemoryDocuments, write_store

LENGTHS = np.array([5, 40, 12, 7, 33, 64, 100, 9])


def ids_of(rule: DomainRule, seq_len: int = 50, masked: bool = False) -> list[int]:
    return select(LENGTHS, rule, seq_len, masked, "rules.x")["ids"].tolist()


def test_rules_by_length() -> None:
    assert ids_of(DomainRule(min_length=12, max_length=64)) == [1, 2, 4, 5]
    assert ids_of(DomainRule(long="drop")) == [0, 1, 2, 3, 4, 7]
    assert ids_of(DomainRule(long="split")) == list(range(8))
    assert ids_of(DomainRule(), masked=True) == [0, 1, 2, 3, 4, 7]  # auto: whole answers
    with pytest.raises(UserError, match=r"2 documents are longer than seq_len=50 \(the longest has 100"):
        ids_of(DomainRule(long="error"))
    assert ids_of(DomainRule(long="error", max_length=50)) == [0, 1, 2, 3, 4, 7]
    with pytest.raises(UserError, match="leaves none of 8 documents"):
        ids_of(DomainRule(min_length=101))


def test_truncated_documents_keep_their_beginning() -> None:
    docs = MemoryDocuments(LENGTHS.tolist())
    view = View(docs, select(LENGTHS, DomainRule(long="truncate"), 50, False, "x"))
    assert view.num_docs == 8 and view.num_tokens == np.minimum(LENGTHS, 50).sum()
    assert np.array_equal(view.doc(6), docs.doc(6)[:50]) and np.array_equal(view.doc(0), docs.doc(0))


def test_upsampling_by_length_repeats_in_rounds() -> None:
    ids = ids_of(DomainRule(upsample={30: 2, 60: 3}))
    assert ids[:8] == list(range(8)) and ids[8:] == [1, 4, 5, 6, 5, 6]
    many = np.full(10_000, 20)
    for times in (0.25, 1.5):
        share = len(select(many, DomainRule(upsample={1: times}), 50, False, "x")["ids"]) / len(many)
        assert abs(share - times) < 0.02


def test_a_rule_that_changes_nothing_needs_no_table() -> None:
    assert is_plain(DomainRule(set="other"), masked=False)
    assert not is_plain(DomainRule(), masked=True)
    assert not is_plain(DomainRule(long="drop"), masked=False)


def test_tables_are_made_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = write_store(tmp_path / "a", [[1, 2, 3]]), []

    def build() -> dict[str, np.ndarray]:
        made.append(1)
        return {"ids": np.arange(3), "offsets": np.arange(4)}

    for _ in range(2):
        tables = cached(store, {"rule": 1}, build)
        assert isinstance(tables["ids"], np.memmap) and tables["ids"].tolist() == [0, 1, 2]
    assert len(made) == 1
    cached(store, {"rule": 2}, build)
    cached(write_store(tmp_path / "b", [[1, 2, 4]]), {"rule": 1}, build)
    assert len(made) == 3
    store.verify()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data.view.exclusive_sibling", refuse)
    assert cached(store, {"rule": 3}, build)["ids"].tolist() == [0, 1, 2]
    assert len(list((tmp_path / "a" / PLANS_FOLDER).iterdir())) == 2
