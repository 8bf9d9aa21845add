import re
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import SyntheticConfig, TokenizerConfig
from data.prepare import prepare
from data.store import TokenStore
from data.synthetic import STREAM, TASKS, draft, sample_rng
from data.tokenizer import load_tokenizer, train_tokenizer
from eval.ruler import sample as ruler

LENGTHS = [800, 2000]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("words") / "tokenizer"
    texts = ["".join(draft(task, sample_rng(9, task, 1, i), 40)) for task in TASKS for i in range(5)]
    train_tokenizer(texts, 512, out)
    return out


@pytest.fixture(scope="module")
def store(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    out = tmp_path_factory.mktemp("set") / "set"
    config = SyntheticConfig(tasks=list(TASKS), lengths=LENGTHS, documents=6)
    prepare(out, "synthetic", 0.1, TokenizerConfig(path=str(tokenizer)), progress=False, synthetic=config)
    return TokenStore(out, "train")


def halves(store: TokenStore, tokenizer: Path) -> list[tuple[int, str, str]]:
    """(tokens, text without loss, text with loss) of each document."""
    words, found = load_tokenizer(tokenizer), []
    for i in range(store.num_docs):
        ids, loss = store.doc(i), store.loss(i)
        assert loss is not None
        split = int(loss.argmax())
        assert loss[split:].all() and ids[-1] == words.eos_id
        found.append((len(ids), words.decode(ids[:split].tolist()), words.decode(ids[split:].tolist())))
    return found


def test_documents_nearly_fill_their_length_and_can_be_answered(store: TokenStore, tokenizer: Path) -> None:
    kinds = set()
    for tokens, text, answer in halves(store, tokenizer):
        limit = min(length for length in LENGTHS if tokens <= length)
        assert tokens > 0.85 * limit
        if key := re.search(r"locker of (\w+)\? It is$", text):
            assert f"The locker of {key[1]} opens with{answer[:-1]}." in text
            assert text.count(f"locker of {key[1]} ") == 1
            kinds.add("multikey" if text.count("opens with") > 1 else "needle")
        elif value := re.search(r"names stand for (\d+)\? They are$", text):
            known = dict(re.findall(r"let (\w+) be (\w+);", text))
            names = answer.strip(" .").split(", ")
            assert len(known) == 8 and len(names) == 4
            for name in known:
                root = name
                while root in known:
                    root = known[root]
                assert (root == value[1]) == (name in names)
            kinds.add("tracking")
        elif question := re.search(r"\n(What .*\?) The .* (?:is|are)$", text):
            known = dict(re.findall(r"One of the \w+ \w+ numbers for (\S+) is: (\d+)\.", text))
            asked = re.findall(r"\b[a-z]{4}-[a-z]{4}\b", question[1])
            assert text.count("\n" + question[1]) == 1 and 1 <= len(asked) <= len(known)
            assert answer == (
                f" {known[asked[0]]}."
                if len(asked) == 1
                else f" {', '.join(f'{key} {known[key]}' for key in asked)}."
            )
            kinds.add("lookup")
        elif value := re.search(r"they are: $", text):
            names = answer.strip(" .").split()
            known = dict(re.findall(r"[A-Z]+ ([A-Z]{5}) = (?:[A-Z]+ )?([A-Z]{5}|\d{5})", text))
            assert set(names) == set(known) and str(len(names)) in text
            assert [known[name] for name in names[1:]] == names[:-1]
            assert f"come to the value {known[names[0]]}" in text
            kinds.add("chain")
        else:
            assert text.startswith("Text:\n") and answer.strip() == text.split("\n")[1]
            kinds.add("copy")
    assert kinds == set(TASKS)


def test_the_random_streams_are_not_those_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part of every seed differs, for all seeds, tasks, lengths and indices."""
    seeds: dict[str, set[str]] = {"train": set(), "ruler": set()}
    for side, module in (("train", "data.synthetic"), ("ruler", "eval.ruler.sample")):
        monkeypatch.setattr(f"{module}.random.Random", lambda seed, side=side: seeds[side].add(str(seed)))
        make = sample_rng if side == "train" else ruler.sample_rng
        for seed in (0, 42):
            for task in (*TASKS, "vt", "niah_single_1", "../ruler"):
                for index in range(3):
                    make(seed, task, 4096, index)
        monkeypatch.undo()
    assert {seed.split("/")[0] for seed in seeds["train"]} == {STREAM}
    assert {seed.split("/")[0] for seed in seeds["ruler"]} == {"ruler"}
    assert not seeds["train"] & seeds["ruler"] and len(seeds["train"]) == 2 * (len(TASKS) + 3) * 3


def test_no_text_of_an_evaluation_occurs() -> None:
    for task in TASKS:
        text = "".join(draft(task, sample_rng(42, task, 4096, 0), 30))
        assert "magic" not in text and "VAR" not in text and "grass is green" not in text


def test_loss_on_everything_and_other_seeds(tokenizer: Path, store: TokenStore, tmp_path: Path) -> None:
    words = TokenizerConfig(path=str(tokenizer))
    every = SyntheticConfig(tasks=list(TASKS), lengths=LENGTHS, documents=6, loss="all")
    prepare(tmp_path / "all", "synthetic", 0.1, words, progress=False, synthetic=every)
    whole = TokenStore(tmp_path / "all", "train")
    assert whole.loss(0) is None and whole.num_docs == store.num_docs
    other = SyntheticConfig(tasks=list(TASKS), lengths=LENGTHS, documents=6, seed=1)
    prepare(tmp_path / "other", "synthetic", 0.1, words, progress=False, synthetic=other)
    texts = {text for _, text, _ in halves(store, tokenizer)}
    assert not texts & {text for _, text, _ in halves(TokenStore(tmp_path / "other", "train"), tokenizer)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SyntheticConfig(tasks=["riddle"]), "choose from needle, multikey, tracking, copy, lookup, chain"),
        (SyntheticConfig(lengths=[9]), "at least 64"),
        (SyntheticConfig(tasks=["tracking"], lengths=[70]), "synthetic.lengths=70 is too short for tracking"),
    ],
)
def test_bad_settings(config: SyntheticConfig, message: str, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(
            tmp_path / "x", "synthetic", 0.1, TokenizerConfig(str(tokenizer)), progress=False, synthetic=config
        )


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give tokenizer\.path"):
        prepare(tmp_path / "x", "synthetic", 0.1, TokenizerConfig(), progress=False)
