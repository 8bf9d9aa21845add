import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
VOCAB = 1024
AWKWARD = (
    "",
    " ",
    "\n",
    "\t\tif x:\r\n\t\t\treturn 1\r\n",
    "   three leading, two trailing  ",
    "a  b   c    d     e",
    "x = '\\t' \\\n\n\n\n    # tail\n   ",
    "café, naïve, Å vs Å, ﬁ, Ⅷ, ½",
    "日本語 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "\ufeffwith a byte order mark",
    "\x00\x01\x7f\u2028\u00a0\u200b",
    "</s> <s> <unk> <0x41> <|endoftext|>",
)


def stdlib_texts(count: int, start: int = 0) -> list[str]:
    files = sorted(STDLIB.glob("*.py"))[start : start + count]
    return [path.read_bytes().decode("utf-8") for path in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "a"
    train_tokenizer(stdlib_texts(30), VOCAB, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_same_ids_as_sentencepiece(tokenizer: Tokenizer, folder: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [*stdlib_texts(60, start=20), *AWKWARD]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)


def test_round_trip_of_source_code_and_awkward_text(tokenizer: Tokenizer) -> None:
    for text in (*stdlib_texts(40, start=30), *AWKWARD, "a \u2581 sentencepiece space \u2581\u2581"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(codec="utf-8"), max_size=80))
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < VOCAB for i in ids)


def test_whitespace_of_source_code_is_compressed(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("):\n        return self")) <= 4
    text = stdlib_texts(1, start=60)[0]
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(stdlib_texts(30), VOCAB, tmp_path / "b")
    for path in folder.iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_loads_with_plain_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x  # 🙂\r\n"
    assert hf(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert hf.decode(tokenizer.encode(text)) == text
    assert (hf.bos_token_id, hf.eos_token_id, len(hf)) == (tokenizer.bos_id, tokenizer.eos_id, VOCAB)


def test_fingerprint_follows_what_is_encoded(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
    assert load_tokenizer(folder / "tokenizer.model").fingerprint == tokenizer.fingerprint
    other = train_tokenizer(stdlib_texts(30, start=5), VOCAB, tmp_path / "other")
    assert other.fingerprint != tokenizer.fingerprint


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]) == "hi"
    assert tokenizer.vocab_size == VOCAB


def test_too_little_text_is_a_user_error(tmp_path: Path) -> None:
    for texts, size in ((["abc def"], 4096), (["abc def"], 10), ([], 300)):
        with pytest.raises(UserError, match=f"train_vocab_size={size}"):
            train_tokenizer(texts, size, tmp_path / "x")


def test_a_sentencepiece_model_that_would_differ_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stdlib_texts(3)[2].splitlines()),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="only BPE models"):
        load_tokenizer(tmp_path / "unigram.model")


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot load"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
