import json
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from conf.schema import DataConfig, DataSetConfig, TokenizerConfig
from data.manifest import Manifest
from data.prepare import prepare, prepare_sets
from data.store import TokenStore
from data.tokenizer import load_tokenizer
from data.writer import ShardWriter, is_heldout

WORDS = TokenizerConfig(train_vocab_size=380)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(60):
        lines = (f"    value_{i}_{j} = compute(other[{i * j}], '{'ab' * (j % 7)}')\n" for j in range(i % 13 + 1))
        (folder / f"file_{i:02d}.py").write_text("def run(self):\n" + "".join(lines))
    (folder / "broken.txt").write_bytes(b"\xff")
    (folder / "records.jsonl").write_text('{"text": "a record"}\n{"nothing": 1}\n')
    return folder


def make(out: Path, source: Path, heldout: float = 0.2, words: TokenizerConfig = WORDS) -> Manifest:
    return prepare(out, str(source), heldout, words, progress=False)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "set"
    make(out, source)
    return out


def test_every_document_comes_back_in_its_split(made: Path, source: Path) -> None:
    tokenizer = load_tokenizer(TokenStore(made, "train").tokenizer_path)
    texts = {path.name: path.read_text() for path in source.glob("*.py")} | {"records.jsonl:1": "a record"}
    for split in ("train", "heldout"):
        store = TokenStore(made, split)
        store.verify()
        found = []
        for i in range(store.num_docs):
            ids = store.doc(i).tolist()
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            found.append(tokenizer.decode(ids))
        expected = [t for name, t in texts.items() if is_heldout(name, 0.2) == (split == "heldout")]
        assert sorted(found) == sorted(expected) and found


def test_manifest_counts_and_names_what_was_skipped(made: Path) -> None:
    manifest = TokenStore(made, "train").manifest
    assert manifest.skipped == {"not valid UTF-8": 1, "field `text` is missing or no string": 1}
    places = [json.loads(line)["place"] for line in (made / "skipped.jsonl").read_text().splitlines()]
    assert places == ["broken.txt", "records.jsonl:2"]
    assert sum(split.documents for split in manifest.splits.values()) == 61
    for split in manifest.splits.values():
        assert sum(split.length_histogram.values()) == split.documents
    assert manifest.dtype == "uint16" and manifest.vocab_size == 380
    assert manifest.tokenizer_fingerprint == load_tokenizer(made / "tokenizer").fingerprint
    on_disk = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, "manifest.json"}


def test_the_same_again_is_left_alone_and_made_anew_is_equal(made: Path, source: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    first = make(made, source)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert make(tmp_path / "again", source) == first


def test_other_settings_are_refused_by_name(made: Path, source: Path) -> None:
    with pytest.raises(UserError, match=r"heldout was 0\.2, now 0\.3"):
        make(made, source, heldout=0.3)
    with pytest.raises(UserError, match="train_vocab_size was 380, now 381"):
        make(made, source, words=TokenizerConfig(train_vocab_size=381))
    with pytest.raises(UserError, match=r"tokenizer\.path was not given"):
        make(made, source, words=TokenizerConfig(path=str(made / "tokenizer")))


def test_dying_half_way_leaves_nothing_valid(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add, added = tmp_path / "set", ShardWriter.add, []

    def dying(self: ShardWriter, name: str, ids: np.ndarray, loss: np.ndarray | None = None) -> None:
        added.append(name)
        if len(added) == 30:
            assert not out.exists()
            raise KeyboardInterrupt
        add(self, name, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            make(out, source)
    assert not out.exists()
    assert make(out, source).splits["train"].documents > 0


def test_a_foreign_folder_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a prepared data set"):
        make(tmp_path / "set", source)
    assert (tmp_path / "set" / "thesis.txt").exists()


def test_empty_results_are_user_errors(made: Path, source: Path, tmp_path: Path) -> None:
    words = TokenizerConfig(path=str(made / "tokenizer"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("")
    one = source / "file_00.py"
    for folder, heldout, message in (
        (tmp_path / "empty", 0.0, "no usable document"),
        (one, 0.000001, "holds out none of 1"),
        (one, 0.999999, "leaves none of 1"),
        (one, 1.0, "must be at least 0 and below 1"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "out", folder, heldout, words)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_large_vocabulary_gets_wider_tokens(made: Path, source: Path, tmp_path: Path) -> None:
    load_tokenizer(made / "tokenizer").save(tmp_path / "wide")
    raw = json.loads((tmp_path / "wide" / "tokenizer.json").read_text())
    raw["model"]["vocab"]["far"] = 1 << 16
    (tmp_path / "wide" / "tokenizer.json").write_text(json.dumps(raw))
    manifest = make(tmp_path / "set", source, words=TokenizerConfig(path=str(tmp_path / "wide")))
    assert manifest.dtype == "uint32" and manifest.vocab_size == (1 << 16) + 1
    assert TokenStore(tmp_path / "set", "train").doc(0).tolist() == TokenStore(made, "train").doc(0).tolist()


def test_sets_of_one_run_share_one_tokenizer(made: Path, source: Path, tmp_path: Path) -> None:
    sets = {
        "first": DataSetConfig(path=str(tmp_path / "first"), source=str(source), heldout=0.2),
        "second": DataSetConfig(path=str(tmp_path / "second"), source=str(source), heldout=0.3),
    }
    manifests = prepare_sets(DataConfig(sets=sets, tokenizer=WORDS), progress=False)
    assert len({manifest.tokenizer_fingerprint for manifest in manifests.values()}) == 1
    assert prepare_sets(DataConfig(sets=sets, tokenizer=WORDS), progress=False) == manifests

    manifest_file = tmp_path / "second" / "manifest.json"
    raw = json.loads(manifest_file.read_text())
    manifest_file.write_text(json.dumps(raw | {"tokenizer_fingerprint": "another"}))
    with pytest.raises(UserError, match=r"data\.sets\.second and data\.sets\.first"):
        prepare_sets(DataConfig(sets=sets, tokenizer=WORDS), progress=False)


def test_nothing_to_train_a_tokenizer_on_says_why(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "text"}\n{"body": "more"}\n')
    with pytest.raises(UserError, match=r"no usable document.*x\.jsonl:1: field `text` is missing"):
        make(tmp_path / "set", tmp_path)
    with pytest.raises(UserError, match="hub:NAME"):
        prepare(tmp_path / "set", "hub:", 0.0, WORDS)
