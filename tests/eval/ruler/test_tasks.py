"""What the generators promise: budgets, exact texts, answers in the haystack, one stream per sample."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from itertools import pairwise

import pytest

from conf.errors import UserError
from eval.ruler.sample import Sample, largest_fitting
from eval.ruler.tasks import BUILT_IN, OFFICIAL, make_sample, make_task
from eval.ruler.template import MODEL_TEMPLATES, NOISE
from eval.ruler.texts import Texts
from eval.ruler.vt import VariableTracking
from tests.eval.build import Small

LENGTHS = (8192, 10_001)
TEXTS = Texts()


def make(small: Small, name: str, length: int, index: int, seed: int = 42, template: str = "base") -> Sample:
    def count(text: str) -> int:
        return len(small.tokenizer.encode(text))

    task = make_task(name, length, count, TEXTS)
    return make_sample(name, task, index, length, seed=seed, count=count, model_template=template)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("length", LENGTHS)
def test_budget_is_filled_and_never_exceeded(small: Small, name: str, length: int) -> None:
    tokens = make_task(name, length, len, TEXTS).tokens
    for index in range(3):
        sample = make(small, name, length, index)
        used = len(small.tokenizer.encode(sample.prompt)) + tokens
        assert used == sample.length <= length
        assert used >= 0.97 * length


@pytest.mark.parametrize("name", BUILT_IN)
def test_same_seed_same_sample_other_index_other_sample(small: Small, name: str) -> None:
    first = make(small, name, 8192, 5)
    assert make(small, name, 8192, 5) == first
    assert make(small, name, 8192, 6).input != first.input
    assert make(small, name, 8192, 5, seed=43).input != first.input


def test_guess_changes_nothing_but_time(small: Small) -> None:
    def count(text: str) -> int:
        return len(small.tokenizer.encode(text))

    task = make_task("niah_single_1", 4096, count, TEXTS)
    kinds = {"seed": 42, "count": count}
    plain = make_sample("niah_single_1", task, 0, 4096, **kinds)
    for guess in (1, plain.size - 1, plain.size, plain.size + 3, 5000):
        assert make_sample("niah_single_1", task, 0, 4096, guess=guess, **kinds).length <= 4096


def test_needle_texts_are_literal(small: Small) -> None:
    sample = make(small, "niah_single_1", 4096, 0)
    (value,) = sample.outputs
    lines = sample.input.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    (key,) = re.findall(rf"One of the special magic numbers for (\S+) is: {value}\.", sample.input)
    assert re.fullmatch(r"\d{7}", value) and "-" in key
    assert lines[-1] == f"What is the special magic number for {key} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert Counter(lines[1:-1])[NOISE] == len(lines) - 3 == sample.size


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_distractor_needles_differ_from_the_one_asked_for(small: Small, name: str) -> None:
    sample = make(small, name, 4096, 1)
    kind = "numbers" if name == "niah_multikey_2" else "uuids"
    needles = re.findall(rf"One of the special magic {kind} for (\S+) is: (\S+)\.", sample.input)
    assert len(needles) == sample.size + 1 and len(dict(needles)) == len(needles)
    asked = re.search(r"for (\S+) mentioned in the provided text\?$", sample.input)
    assert asked and dict(needles)[asked[1]] == sample.outputs[0]
    if kind == "uuids":
        assert all(uuid.UUID(part).version == 4 for pair in needles for part in pair)


def test_needles_lie_at_all_depths(small: Small) -> None:
    depths = []
    for index in range(40):
        sample = make(small, "niah_single_1", 4096, index)
        depths.append(sample.input.find(sample.outputs[0]) / len(sample.input))
    assert min(depths) < 0.2 and max(depths) > 0.8 and 0.3 < sum(depths) / len(depths) < 0.7


def test_variable_tracking(small: Small) -> None:
    sample = make(small, "vt", 4096, 0)
    example, problem = sample.input.split("\n\nMemorize and track", 1)
    asked = re.search(r"assigned the value (\d{5}) in the text above\.$", problem)
    assert asked
    value, names = asked[1], sample.outputs
    assert len(set(names)) == 5 and all(re.fullmatch(r"[A-Z]{5}", name) for name in names)
    steps = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", problem)
    assert steps == [(names[0], value), *((new, old) for old, new in pairwise(names))]
    assert sample.answer_prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned "
        f"the value {value}, they are: "
    )
    shown = example.rsplit("they are: ", 1)[1].split()
    assert len(shown) == 5 and all(re.fullmatch(r"[A-Z]{3}", name) for name in shown)
    assert re.findall(r"VAR (\w{3}) =", example) == shown
    assert make(small, "vt", 4096, 1).input.split("\n\nMemorize")[0] != example


def test_solved_example_has_at_most_500_tokens() -> None:
    def count(text: str) -> int:
        return len(text.split())

    for length, most in ((131_072, 500), (4096, 500), (2048, 256)):
        task = make_task("vt", length, count, TEXTS)
        sample = make_sample("vt", task, 0, length, seed=42, count=count)
        example = sample.input.split("\n\nMemorize and track", 1)[0]
        asked = count(example) - 5  # without the five names
        assert most - count(NOISE) < asked <= most
    assert VariableTracking.fitted(300, count).example_noise == 5


def test_frequent_words(small: Small) -> None:
    sample = make(small, "fwe", 4096, 0)
    coded = sample.input.split("coded words. ", 1)[1].split("\nQuestion:")[0].split(" ")
    counts = Counter(coded).most_common(5)
    assert [word for word, _ in counts[:4]] == ["...", *sample.outputs]
    assert counts[3][1] > counts[4][1]
    assert counts[0][1] / counts[1][1] == pytest.approx(4, rel=0.02)  # rank^-2
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in sample.outputs)


@pytest.mark.parametrize(("length", "often", "rarely"), [(2900, 6, 1), (8192, 30, 3)])
def test_common_words(small: Small, length: int, often: int, rarely: int) -> None:
    sample = make(small, "cwe", length, 0)
    listed = sample.input.rsplit("appear most often.\n", 1)[1].split("\nQuestion:")[0]
    words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed)
    counts = Counter(words)
    assert {word for word, n in counts.items() if n == often} == set(sample.outputs)
    assert len(sample.outputs) == 10 and set(counts.values()) == {often, rarely}
    assert listed.startswith("1. ") and f" {len(words)}. " in listed


def test_model_template_goes_around_the_task(small: Small) -> None:
    sample = make(small, "vt", 4096, 0, template="meta-chat")
    assert sample.input.startswith("[INST] Memorize") and sample.input.endswith(" [/INST]")
    assert sample.prompt == sample.input + sample.answer_prefix
    assert len(small.tokenizer.encode(sample.prompt)) + 30 == sample.length <= 4096
    with pytest.raises(UserError, match="unknown"):
        make(small, "vt", 4096, 0, template="nobody")
    assert all(template.count("{task_template}") == 1 for template in MODEL_TEMPLATES.values())


def test_what_cannot_be_made_is_refused(small: Small) -> None:
    assert len(OFFICIAL) == 13 and set(BUILT_IN) < set(OFFICIAL)
    for name in set(OFFICIAL) - set(BUILT_IN):
        with pytest.raises(UserError, match=r"needs? "):
            make_task(name, 4096, len, TEXTS)
    with pytest.raises(UserError, match="unknown"):
        make_task("niah", 4096, len, TEXTS)
    with pytest.raises(UserError, match="too short for vt"):
        make(small, "vt", 256, 0)


@pytest.mark.parametrize("per_unit", [0.3, 1, 7.5, 40])
@pytest.mark.parametrize("budget", [60, 1000, 54_321])
def test_search_finds_the_largest_size(per_unit: float, budget: int) -> None:
    calls = []

    def count(size: int) -> int:
        calls.append(size)
        return 20 + int(per_unit * size)

    size, tokens = largest_fitting(count, budget, smallest=1)
    assert tokens == 20 + int(per_unit * size) <= budget
    assert tokens >= 0.995 * budget or 20 + int(per_unit * (size + 1)) > budget
    assert len(calls) <= 14
