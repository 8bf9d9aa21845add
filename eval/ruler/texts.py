"""Texts that RULER builds on and that are not shipped: essays, question answering sets, a long word list.

They come from a folder the user names (`ruler.data`). `ruler.data=local` takes prose of this machine instead,
which makes the essay tasks run anywhere; their scores are those of another benchmark, `ruler-local`.

    <data>/PaulGrahamEssays.json      {"text": ...}, or essays/*.txt, or *.txt and *.md
    <data>/squad.json                 SQuAD v2.0 dev, or dev-v2.0.json
    <data>/hotpotqa.json              HotpotQA dev distractor, or hotpot_dev_distractor_v1.json
    <data>/english_words.json         words of the counting task beyond wonderwords' 8,166; optional
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.errors import UserError

LOCAL = "local"
ESSAYS = "PaulGrahamEssays.json"
SQUAD = ("squad.json", "dev-v2.0.json")
HOTPOTQA = ("hotpotqa.json", "hotpot_dev_distractor_v1.json")
WORDS = "english_words.json"
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
SENTENCE_START = re.compile(r"^[\"'“‘(\[]*[A-Z0-9]")
ABBREVIATION = re.compile(r"^(?:[A-Z]|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|Prof|Inc|Jr|No|cf|al)\.$")


@dataclass(frozen=True)
class Essays:
    """Running text as sentences, and how many words come before each. Longer haystacks repeat it, as RULER does.

    Sentence ends are found by rule (a stop, then a capital or a digit), not by nltk's trained model.
    """

    sentences: tuple[str, ...]
    starts: tuple[int, ...]
    words: int

    @classmethod
    def of(cls, text: str) -> Essays:
        words = text.split()
        cuts = [0]
        for i in range(1, len(words)):
            before = words[i - 1]
            if SENTENCE_END.search(before) and SENTENCE_START.match(words[i]) and not ABBREVIATION.match(before):
                cuts.append(i)
        ends = [*cuts[1:], len(words)]
        return cls(tuple(" ".join(words[a:b]) for a, b in zip(cuts, ends, strict=True)), tuple(cuts), len(words))

    def take(self, words: int) -> list[str]:
        """The sentences of the first `words` words, the last one cut."""
        rounds, rest = divmod(words, self.words)
        whole = bisect.bisect_right(self.starts, rest) - 1  # sentences before the one that is cut
        taken = [*self.sentences * rounds, *self.sentences[:whole]]
        cut = self.sentences[whole].split(" ")[: rest - self.starts[whole]]
        return [*taken, " ".join(cut)] if cut else taken


@dataclass(frozen=True)
class Question:
    """`own`: documents that hold the answer; `near`: distractors that are used first."""

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


class Texts:
    """What `ruler.data` holds; each part is read when a task asks for it.

    Attributes:
        benchmark: `ruler`, or `ruler-local` for the text of this machine.
    """

    def __init__(self, data: str = "") -> None:
        self.data = data
        self.benchmark = "ruler-local" if data == LOCAL else "ruler"
        self.folder = Path(data) if data and data != LOCAL else None
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"ruler.data={data} is not a folder: name one with {ESSAYS} or *.txt, or use local")

    @cached_property
    def essay_text(self) -> str:
        """The text behind `essays`, as found."""
        if self.data == LOCAL:
            return _local_text()
        if self.folder is None:
            raise UserError(
                f"the essay tasks need ruler.data=FOLDER with {ESSAYS} or .txt files, or ruler.data=local "
                "(text of this machine, reported as ruler-local)"
            )
        if (self.folder / ESSAYS).is_file():
            return str(_json(self.folder / ESSAYS)["text"])
        inner = self.folder / "essays"
        root = inner if inner.is_dir() else self.folder
        files = sorted(path for path in root.rglob("*") if path.suffix in (".txt", ".md") and path.is_file())
        text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
        if not text.split():
            raise UserError(f"ruler.data={self.data} holds no essays: {ESSAYS} or .txt files are expected")
        return text

    @cached_property
    def essays(self) -> Essays:
        return Essays.of(self.essay_text)

    @cached_property
    def squad(self) -> Questions:
        """Answerable questions of SQuAD v2.0; paragraphs of the same article are the nearest distractors."""
        path = self._file(SQUAD, "qa_1", "SQuAD v2.0's dev-v2.0.json")
        articles = [[p["context"] for p in article["paragraphs"]] for article in _json(path)["data"]]
        documents = tuple(sorted({text for article in articles for text in article}))
        number = {text: i for i, text in enumerate(documents)}
        found = []
        for article in _json(path)["data"]:
            near = [number[p["context"]] for p in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                own = number[paragraph["context"]]
                others = tuple(i for i in near if i != own)
                for item in paragraph["qas"]:
                    if not item.get("is_impossible", False):
                        answers = tuple(answer["text"] for answer in item["answers"])
                        found.append(Question(item["question"], answers, (own,), others))
        return Questions(documents, tuple(found))

    @cached_property
    def hotpotqa(self) -> Questions:
        path = self._file(HOTPOTQA, "qa_2", "HotpotQA's hotpot_dev_distractor_v1.json")
        items = _json(path)
        texts = [[f"{title}\n{''.join(lines)}" for title, lines in item["context"]] for item in items]
        documents = tuple(sorted({text for own in texts for text in own}))
        number = {text: i for i, text in enumerate(documents)}
        questions = (
            Question(item["question"], (item["answer"],), tuple(number[text] for text in own))
            for item, own in zip(items, texts, strict=True)
        )
        return Questions(documents, tuple(questions))

    @cached_property
    def more_words(self) -> tuple[str, ...]:
        """RULER's long word list, or nothing."""
        if self.folder is None or not (self.folder / WORDS).is_file():
            return ()
        found = _json(self.folder / WORDS)
        return tuple(found.values() if isinstance(found, dict) else found)

    def facts(self, tasks: list[str]) -> dict[str, str]:
        """Hashes of what the tasks use, by kind: other texts make other samples."""
        found: dict[str, str] = {}
        if any(task in ESSAY_TASKS for task in tasks):
            found["essays"] = _hash(self.essay_text)
        for task, questions in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
            if task in tasks:
                found[questions] = _hash(repr(getattr(self, questions)))
        if "cwe" in tasks and self.more_words:
            found["words"] = _hash(repr(self.more_words))
        return found

    def _file(self, names: tuple[str, ...], task: str, what: str) -> Path:
        files = [self.folder / name for name in names] if self.folder is not None else []
        for file in files:
            if file.is_file():
                return file
        raise UserError(f"{task} needs {what}, which is not shipped: set ruler.data=FOLDER with {names[0]} in it")


ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _local_text() -> str:
    """Prose that comes with Python: the language reference behind `help()`, about 100,000 words."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("ruler.data=local: this Python lacks pydoc_data; name a folder of text instead") from error
    return "\n".join(str(topics[name]) for name in sorted(topics))
