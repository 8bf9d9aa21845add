from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data.store import TokenStore
from tests.data.build import write_store

DOCS = [list(range(k, k + k % 40 + 1)) for k in range(100)]


def test_documents_come_back_whole_across_shards(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", DOCS)
    assert len(store.manifest.splits["train"].shards) > 5
    assert store.num_docs == len(store) == len(DOCS)
    assert store.num_tokens == sum(map(len, DOCS))
    assert sorted(store.doc(i).tolist() for i in range(store.num_docs)) == sorted(DOCS)
    assert [store.doc_length(i) for i in range(5)] == [len(store.doc(i)) for i in range(5)]
    assert store.doc(0).dtype == np.uint16 and not store.doc(0).flags.writeable


def test_order_is_not_the_order_of_the_source(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", DOCS)
    firsts = [int(store.doc(i)[0]) for i in range(store.num_docs)]
    assert firsts != sorted(firsts)


def test_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    first, same, other = (write_store(tmp_path / n, d) for n, d in (("a", DOCS), ("b", DOCS), ("c", DOCS[1:])))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_damage_is_found(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", DOCS)
    store.verify()
    shard = tmp_path / "a" / "train-00002.bin"
    good = shard.read_bytes()

    shard.write_bytes(good[:-2])
    with pytest.raises(UserError, match=r"train-00002\.bin holds"):
        TokenStore(tmp_path / "a", "train")

    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(UserError, match=r"train-00002\.bin is damaged"):
        TokenStore(tmp_path / "a", "train").verify()

    shard.unlink()
    with pytest.raises(UserError, match=r"train-00002\.bin is missing"):
        TokenStore(tmp_path / "a", "train")


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a prepared data set"):
        TokenStore(tmp_path, "train")
    write_store(tmp_path / "a", DOCS)
    with pytest.raises(UserError, match="no heldout documents"):
        TokenStore(tmp_path / "a", "heldout")
    (tmp_path / "a" / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="damaged"):
        TokenStore(tmp_path / "a", "train")
    (tmp_path / "a" / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version 99"):
        TokenStore(tmp_path / "a", "train")
