"""Tokenizers that begin every text with bos, as Llama's and Mistral's do: so does every prepared document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from conf.schema import ReadConfig, SyntheticConfig, TokenizerConfig
from data.prepare import prepare
from data.store import TokenStore
from data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [f"text number {i}: " + "some words, again and again; " * (i % 7 + 1) for i in range(40)]


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The post-processor of Llama 3's tokenizer.json: bos in front, nothing behind."""
    plain, out = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("llama")
    train_tokenizer(TEXTS, 340, plain)
    hf = AutoTokenizer.from_pretrained(str(plain))
    bos = str(hf.bos_token)
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, hf.bos_token_id)]
    )
    hf.save_pretrained(str(out))
    assert load_tokenizer(plain).first_id is None
    assert load_tokenizer(plain).fingerprint != load_tokenizer(out).fingerprint, "sets of the two do not mix"
    return out


def test_documents_are_what_the_tokenizer_itself_gives(llama_like: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "texts", tmp_path / "set"
    source.mkdir()
    for i, text in enumerate(TEXTS):
        (source / f"{i}.txt").write_text(text)
    prepare(out, str(source), 0.2, TokenizerConfig(path=str(llama_like)), progress=False, workers=2)
    hf, found = AutoTokenizer.from_pretrained(str(llama_like)), []
    for split in ("train", "heldout"):
        store = TokenStore(out, split)
        found += [store.doc(i).tolist() for i in range(store.num_docs)]
    assert sorted(found) == sorted([*hf(text)["input_ids"], hf.eos_token_id] for text in TEXTS)
    assert load_tokenizer(out / "tokenizer").first_id == hf.bos_token_id


def test_weighted_records_and_answers(llama_like: Path, tmp_path: Path) -> None:
    words = TokenizerConfig(path=str(llama_like))
    bos, eos = (load_tokenizer(llama_like).__dict__[name] for name in ("first_id", "eos_id"))
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps({"text": text, "w": 0.5}) + "\n" for text in TEXTS))
    prepare(tmp_path / "weighted", str(records), 0.2, words, progress=False, read=ReadConfig(weight="w"))
    made_up = SyntheticConfig(lengths=[1024], documents=3)
    prepare(tmp_path / "tasks", "synthetic", 0, words, progress=False, synthetic=made_up)
    for name in ("weighted", "tasks"):
        store = TokenStore(tmp_path / name, "train")
        for i in range(store.num_docs):
            ids, loss = store.doc(i), store.loss(i)
            assert loss is not None and len(loss) == len(ids)
            assert (ids[0], ids[-1]) == (bos, eos) and bos not in ids[1:] and eos not in ids[:-1]
            assert loss[0] == (0.5 if name == "weighted" else 0)
            assert name == "weighted" or len(ids) <= 1024


def test_ids_that_were_given_stay_as_they_are(llama_like: Path, tmp_path: Path) -> None:
    records = tmp_path / "ids.jsonl"
    records.write_text("".join(json.dumps({"input_ids": [10 + i, 20, 30]}) + "\n" for i in range(40)))
    words = TokenizerConfig(path=str(llama_like))
    prepare(tmp_path / "ids", str(records), 0.2, words, progress=False, read=ReadConfig(kind="tokens"))
    store = TokenStore(tmp_path / "ids", "train")
    assert all(store.doc(i).tolist()[1:3] == [20, 30] and len(store.doc(i)) == 4 for i in range(store.num_docs))


@pytest.mark.parametrize(
    ("said", "ends"),
    [('{"eos_token_id": [5, 2, 9]}', [2, 5, 9]), ('{"eos_token_id": 7}', [2, 7]), ("{}", [2]), ("[]", [2]),
     ('{"eos_token_id": "x"}', [2]), ('{"eos_token_id": [99999, null]}', [2]), ("{torn", [2])],
)  # fmt: skip
def test_what_ends_an_answer(llama_like: Path, tmp_path: Path, said: str, ends: list[int]) -> None:
    load_tokenizer(llama_like).save(tmp_path / "folder")
    assert load_tokenizer(tmp_path / "folder").end_ids == [2]
    (tmp_path / "folder" / "generation_config.json").write_text(said)
    again = load_tokenizer(tmp_path / "folder")
    again.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").end_ids == again.end_ids == ends
