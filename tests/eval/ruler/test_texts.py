"""Tasks on texts from a folder: essays, question answering, the long word list, and text of this machine."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from eval.ruler.cwe import CommonWords
from eval.ruler.niah import DEPTHS, Niah
from eval.ruler.sample import Sample
from eval.ruler.tasks import answer_tokens, make_sample, make_task
from eval.ruler.texts import ESSAY_TASKS, Essays, Texts
from tests.eval.build import Small

PROSE = [
    f"Sentence {i} says that {word} is number {i}, and no more." for i, word in enumerate("abcdefghijklmn" * 9)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    (root / "PaulGrahamEssays.json").write_text(json.dumps({"text": "\n\n".join(PROSE)}))
    rng = random.Random(3)

    def paragraph(name: str) -> str:
        return f"{name} " + " ".join(
            rng.choice(["grass", "sky", "sun", "back"]) for _ in range(rng.randint(20, 90))
        )

    articles = []
    for a in range(6):
        paragraphs: list[dict[str, Any]] = []
        for p in range(5):
            good = {"question": f"what is {a}.{p}?", "is_impossible": False, "answers": [{"text": f"A{a}"}] * 2}
            bad = {"question": "unknown?", "is_impossible": True, "answers": []}
            paragraphs.append({"context": paragraph(f"P{a}.{p}"), "qas": [bad, good]})
        articles.append({"paragraphs": paragraphs})
    (root / "squad.json").write_text(json.dumps({"data": articles}))
    items = [
        {
            "question": f"who is {i}?",
            "answer": "yes",
            "context": [[f"T{i}.{j}", [paragraph("x"), " y."]] for j in (0, 1)],
        }
        for i in range(40)
    ]
    (root / "hotpot_dev_distractor_v1.json").write_text(json.dumps(items))
    return root


def make(small: Small, name: str, data: Path | str, index: int = 0, length: int = 4096) -> Sample:
    def count(text: str) -> int:
        return len(small.tokenizer.encode(text))

    task = make_task(name, length, count, Texts(str(data)))
    return make_sample(name, task, index, length, seed=42, count=count)


@pytest.mark.parametrize("name", [*ESSAY_TASKS, "qa_1", "qa_2"])
@pytest.mark.parametrize("length", [4096, 7777])
def test_budget_is_filled(small: Small, folder: Path, name: str, length: int) -> None:
    for index in (0, 1):
        sample = make(small, name, folder, index, length)
        used = len(small.tokenizer.encode(sample.prompt)) + answer_tokens(name)
        assert 0.97 * length <= used == sample.length <= length
    assert make(small, name, folder, 1, length) == sample


@pytest.mark.parametrize(
    ("name", "keys", "answers", "value"),
    [
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f-]{36}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 1, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_essay_needles(small: Small, folder: Path, name: str, keys: int, answers: int, value: str) -> None:
    sample = make(small, name, folder)
    kind = "uuids" if name == "niah_single_3" else "numbers"
    needles = re.findall(rf"One of the special magic {kind} for (\S+) is: ({value})\.", sample.input)
    assert len({key for key, _ in needles}) == keys and len(sample.outputs) == answers
    assert {v for _, v in needles} >= set(sample.outputs) and len(needles) == max(keys, answers)
    question = sample.input.split("\n")[-1]
    asked = [key for key, v in needles if v in sample.outputs]
    assert all(key in question for key in asked)
    plural = answers > 1
    assert question.startswith(
        f"What {'are all' if plural else 'is'} the special magic {kind if plural else kind[:-1]} "
    )
    if name == "niah_multiquery":
        assert question.count(",") == 3 and ", and " in question
        order = re.findall(r"[a-z'.-]+-[a-z'.-]+", question.split(" for ")[1])
        assert [dict(needles)[key] for key in order] == sample.outputs
    without = re.sub(rf"One of the special magic {kind} for \S+ is: {value}\. ?", "", sample.input)
    context = without.split("\n")[1]
    assert re.sub(r"\s+", " ", context).startswith(PROSE[0])  # the essays, in order
    for part in re.split(rf"One of the special magic {kind} for \S+ is: {value}\.", sample.input)[1:-1]:
        assert part.strip() == "" or part.strip().endswith("more.")  # between sentences, never inside one


def test_essays_repeat_and_cut() -> None:
    essays = Essays.of("First one here. Second is longer, e.g. this. Mr. Third came! 'Fourth?' Yes.")
    assert essays.sentences == (
        "First one here.",
        "Second is longer, e.g. this.",
        "Mr. Third came!",
        "'Fourth?'",
        "Yes.",
    )
    assert essays.words == 13
    assert essays.take(5) == ["First one here.", "Second is"]
    assert " ".join(essays.take(30)).split() == (" ".join(essays.sentences).split() * 3)[:30]
    assert essays.take(13) == list(essays.sentences)


def test_needles_take_the_forty_depths(folder: Path) -> None:
    assert len(set(DEPTHS)) == 40 and (DEPTHS[0], DEPTHS[-1]) == (0, 100)
    task = Niah("essay", essays=Texts(str(folder)).essays)
    seen = set()
    for i in range(200):
        before = task.draft(random.Random(i), 900, 0).text.split("\n")[1].split("One of the special")[0]
        seen.add(before.count("more."))
    assert len(seen) > 30 and min(seen) == 0


def test_question_answering(small: Small, folder: Path) -> None:
    places = []
    for index in range(30):
        sample = make(small, "qa_1", folder, index)
        a, p = divmod(index, 5)
        assert sample.input.endswith(f"Question: what is {a}.{p}?") and sample.outputs == [f"A{a}"] * 2
        documents = re.findall(r"Document (\d+):\n(P\d\.\d)", sample.input)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        names = [name for _, name in documents]
        assert names.count(f"P{a}.{p}") == 1  # the answer is never repeated
        assert {f"P{a}.{i}" for i in range(5)} <= set(names)  # its article comes first
        places.append(names.index(f"P{a}.{p}") / len(names))
    assert len({round(place, 1) for place in places}) > 5  # not always at the same depth
    with pytest.raises(UserError, match="has 30 questions"):
        make(small, "qa_1", folder, 30)
    two = make(small, "qa_2", folder, 7)
    assert "T7.0\n" in two.input and "T7.1\n" in two.input and two.answer_prefix == " Answer:"


def test_long_word_list(tmp_path: Path) -> None:
    (tmp_path / "english_words.json").write_text(json.dumps({str(i): f"longword{i}" for i in range(9000)}))
    words = Texts(str(tmp_path)).more_words
    assert len(words) == 9000 and Texts().more_words == ()
    text = CommonWords(131_072, words).draft(random.Random(0), 8500, 0).text.rsplit("appear most often.\n", 1)[1]
    assert (
        "longword" in text and "longword" not in CommonWords(131_072, words).draft(random.Random(0), 500, 0).text
    )


def test_local_text_has_a_name_of_its_own(small: Small) -> None:
    texts = Texts("local")
    assert texts.benchmark == "ruler-local" and Texts().benchmark == Texts("").benchmark == "ruler"
    assert texts.essays.words > 50_000
    sample = make(small, "niah_single_2", "local")
    assert sample.outputs[0] in sample.input
    facts = texts.facts(["niah_single_2", "vt"])
    assert list(facts) == ["essays"] and texts.facts(["vt"]) == {}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    cases = [("niah_single_2", "", r"ruler\.data=FOLDER"), ("qa_1", "", r"dev-v2\.0"), ("qa_2", "local", "hotpot")]
    for name, data, message in cases:
        with pytest.raises(UserError, match=message):
            make_task(name, 4096, len, Texts(data))
    with pytest.raises(UserError, match="holds no essays"):
        make_task("niah_single_3", 4096, len, Texts(str(tmp_path)))
    with pytest.raises(UserError, match="not a folder"):
        Texts("/nonexistent")
    (tmp_path / "squad.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        make_task("qa_1", 4096, len, Texts(str(tmp_path)))
