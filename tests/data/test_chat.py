import json
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import ReadConfig, TokenizerConfig
from data.chat import ChatError, segments
from data.prepare import prepare
from data.store import TokenStore
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = ReadConfig(kind="chat")
TEXTS = [f"some words about topic {i}, with the answer {i * 7} in it" for i in range(80)]


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation of user and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "tokenizer"
    train_tokenizer([*TEXTS, "user assistant system:\n" * 30], 320, out)
    return out


@pytest.fixture(scope="module")
def chatml(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with control tokens of its own for turns, which are not its eos."""
    tokenizer = load_tokenizer(plain)
    tokenizer.hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.hf.chat_template = CHATML
    out = tmp_path_factory.mktemp("chatml") / "tokenizer"
    Tokenizer(tokenizer.hf, "x").save(out)
    return out


def prepared(out: Path, chats: list[object], tokenizer: Path, **read: str) -> TokenStore:
    source = out.parent / f"{out.name}.jsonl"
    source.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    config = ReadConfig(kind="chat", **read)
    prepare(out, str(source), 0.0, TokenizerConfig(path=str(tokenizer)), progress=False, read=config)
    return TokenStore(out, "train")


def parts(store: TokenStore, i: int, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """The document as runs of equal loss, with control tokens spelt out."""
    loss = store.loss(i)
    assert loss is not None and len(loss) == store.doc_length(i)
    runs: list[tuple[bool, list[int]]] = []
    for token, on in zip(store.doc(i).tolist(), loss.astype(bool).tolist(), strict=True):
        if not runs or runs[-1][0] != on:
            runs.append((on, []))
        runs[-1][1].append(token)
    return [(on, tokenizer.hf.decode(ids)) for on, ids in runs]


def test_a_trained_tokenizer_has_a_plain_template(plain: Path, tmp_path: Path) -> None:
    store = prepared(tmp_path / "a", [turns("hi", "yes", "why?", "so", system="be brief")], plain)
    tokenizer = load_tokenizer(plain)
    assert parts(store, 0, tokenizer) == [
        (False, "system:\nbe brief\n\nuser:\nhi\n\nassistant:\n"),
        (True, "yes</s>"),
        (False, "\n\nuser:\nwhy?\n\nassistant:\n"),
        (True, "so</s>"),
    ]
    assert store.doc(0)[-1] == tokenizer.eos_id


def test_control_tokens_of_the_template_are_tokens(chatml: Path, tmp_path: Path) -> None:
    store = prepared(tmp_path / "a", [turns("hi", "yes", "trailing question")], chatml)
    tokenizer = load_tokenizer(chatml)
    assert parts(store, 0, tokenizer) == [
        (False, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (True, "yes<|im_end|>\n"),
        (False, "</s>"),  # ends the document, and is not what the model should say
    ]
    start = tokenizer.hf.convert_tokens_to_ids("<|im_start|>")
    assert store.doc(0).tolist().count(start) == 2


def test_bad_conversations_are_counted_by_reason(chatml: Path, tmp_path: Path) -> None:
    chats: list[object] = [
        turns("good", "answer"),
        turns("no answer"),
        [],
        "text",
        [{"content": "x"}],
        [{"role": "user", "content": ["parts"]}],
        turns("inject <|im_end|>", "answer"),
        turns("empty answer", " "),
    ]
    store = prepared(tmp_path / "a", chats, chatml)
    assert store.num_docs == 1
    assert store.manifest.skipped == {
        "no answer of the assistant": 2,
        "no list of messages": 2,
        "a message without a role": 1,
        "a message whose content is no string": 1,
        "a message spells the control token <|im_end|>": 1,
    }
    with pytest.raises(UserError, match="no answer of the assistant"):
        prepared(tmp_path / "b", chats, chatml, on_error="fatal")


def test_a_template_that_rewrites_or_refuses(plain: Path) -> None:
    hf = load_tokenizer(plain).hf
    hf.chat_template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ChatError, match="does not keep earlier turns"):
        segments(hf, turns("a", "b"))
    hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatError, match="roles must alternate"):
        segments(hf, turns("a", "b"))


def test_a_tokenizer_without_a_template_is_refused(plain: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(plain)
    tokenizer.hf.chat_template = None
    tokenizer.save(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no chat template"):
        prepared(tmp_path / "a", [turns("a", "b")], tmp_path / "bare")


def test_what_is_trained_on_is_what_generation_sees(chatml: Path, tmp_path: Path) -> None:
    """The prompt's tokens are those that transformers makes of it when it asks for an answer."""
    chat = turns("first question", "first answer", "second question", "second answer")
    store = prepared(tmp_path / "a", [chat], chatml)
    hf = load_tokenizer(chatml).hf
    ids, loss = store.doc(0).tolist(), store.loss(0)
    assert loss is not None
    prompt = hf.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    expected = hf(prompt, add_special_tokens=False).input_ids
    assert ids[: len(expected)] == expected and not loss[: len(expected)].any() and loss[len(expected)]
