"""Resuming: nothing is lost, nothing is done twice, nothing of another run is taken for ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import RulerConfig
from eval.files import read_lines
from eval.ruler.run import Encoder, make_samples, run_ruler
from eval.ruler.store import PredictionFile, SampleFile
from eval.ruler.texts import Texts
from tests.eval.build import Small

CONFIG = RulerConfig(tasks=["niah_single_1", "fwe"], lengths=[1024], samples=7)


class Killed(Exception):
    pass


class Perfect:
    """Answers by looking for the tokens of the needle; counts prompts; can be killed after some of them."""

    def __init__(self, small: Small, after: int = 10**9) -> None:
        self.small, self.after, self.prompts = small, after, 0

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        self.prompts += len(prompts)
        if self.prompts > self.after:
            raise Killed
        texts = [self.small.tokenizer.decode(prompt) for prompt in prompts]
        found = [text.split(" is: ")[1][:7] if " is: " in text else "" for text in texts]
        return [self.small.tokenizer.encode(f" {answer}.")[:tokens] for answer in found]


def run(small: Small, out: Path, answer: Perfect, config: RulerConfig = CONFIG, **facts: Any) -> dict[str, Any]:
    encoder = Encoder(small.tokenizer)
    about = {"full": {"plan": "full", **facts}}
    return run_ruler(config, encoder, out, {"full": answer}, about, lambda *_: None, batch_size=3)


def lines(out: Path, pattern: str) -> list[dict[str, Any]]:
    (path,) = out.glob(pattern)
    return list(read_lines(path))


def test_scores_come_from_saved_predictions(small: Small, tmp_path: Path) -> None:
    result = run(small, tmp_path, Perfect(small))["full"]
    assert result["lengths"]["1024"]["scores"] == {"niah_single_1": 100.0, "fwe": 0.0}
    assert result["lengths"]["1024"]["mean"] == result["mean"] == 50.0
    assert result["lengths"]["1024"]["empty"] == {"niah_single_1": 0, "fwe": 0}
    assert result["effective_length"] is None and not result["all_tasks"]
    rows = lines(tmp_path, "ruler/pred-*/1024/niah_single_1.jsonl")
    assert [row["index"] for row in rows] == list(range(7))
    assert set(rows[0]) == {"index", "pred", "input", "outputs", "others", "truncation", "length"}
    saved = lines(tmp_path, "ruler/data-*/1024/niah_single_1/validation.jsonl")
    assert {"index", "input", "outputs", "length", "answer_prefix"} <= set(saved[0])
    assert saved[0]["answer_prefix"] and not saved[0]["input"].endswith(saved[0]["answer_prefix"])


@pytest.mark.parametrize("after", [0, 3, 6, 9])
def test_killed_between_batches(small: Small, tmp_path: Path, after: int) -> None:
    whole = run(small, tmp_path / "whole", Perfect(small))
    first = Perfect(small, after)
    with pytest.raises(Killed):
        run(small, tmp_path / "killed", first)
    second = Perfect(small)
    resumed = run(small, tmp_path / "killed", second)
    done = {0: 0, 3: 3, 6: 6, 9: 7}[after]  # the second task's first batch of 3 is what 9 stops in
    assert second.prompts == 14 - done
    assert resumed["full"]["lengths"] == whole["full"]["lengths"]
    for task in CONFIG.tasks:
        indices = [row["index"] for row in lines(tmp_path / "killed", f"ruler/pred-*/1024/{task}.jsonl")]
        assert indices == list(range(7))


def test_torn_lines_are_made_again(small: Small, tmp_path: Path) -> None:
    run(small, tmp_path, Perfect(small))
    (samples,) = tmp_path.glob("ruler/data-*/1024/fwe/validation.jsonl")
    (predictions,) = tmp_path.glob("ruler/pred-*/1024/fwe.jsonl")
    before = samples.read_bytes(), predictions.read_bytes()
    for path in (samples, predictions):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - 50])  # a kill in the middle of the last line
    again = Perfect(small)
    run(small, tmp_path, again)
    assert again.prompts == 1
    assert (samples.read_bytes(), predictions.read_bytes()) == before


def test_any_prediction_may_be_missing(small: Small, tmp_path: Path) -> None:
    run(small, tmp_path, Perfect(small))
    (path,) = tmp_path.glob("ruler/pred-*/1024/fwe.jsonl")
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([rows[5], rows[0], rows[3]]))
    again = Perfect(small)
    run(small, tmp_path, again)
    assert again.prompts == 4
    assert sorted(row["index"] for row in read_lines(path)) == list(range(7))


def test_indices_are_sample_numbers_not_places_in_the_text(small: Small, tmp_path: Path) -> None:
    config = RulerConfig(tasks=["niah_single_1"], lengths=[1024], samples=40)
    folder = make_samples(config, Encoder(small.tokenizer), Texts(), tmp_path, lambda *_: None)
    samples = list(SampleFile(folder, 1024, "niah_single_1").read(40))
    assert [sample.index for sample in samples] == list(range(40))
    assert len({sample.input for sample in samples}) == 40  # places in the text would collide: few lines of noise
    places = {sample.input.find(sample.outputs[0]) for sample in samples}
    assert len(places) < 40


def test_more_samples_extend_what_is_there(small: Small, tmp_path: Path) -> None:
    few = RulerConfig(tasks=["fwe"], lengths=[1024], samples=2)
    more = RulerConfig(tasks=["fwe"], lengths=[1024], samples=5)
    run(small, tmp_path, Perfect(small), few)
    (path,) = tmp_path.glob("ruler/data-*/1024/fwe/validation.jsonl")
    before = path.read_bytes()
    answer = Perfect(small)
    assert run(small, tmp_path, answer, more)["full"]["samples"] == 5
    assert answer.prompts == 3 and path.read_bytes().startswith(before)
    again = Perfect(small)
    assert run(small, tmp_path, again, few)["full"]["samples"] == 2
    assert again.prompts == 0


def test_another_checkpoint_or_seed_shares_nothing(small: Small, tmp_path: Path) -> None:
    for number, (seed, checkpoint) in enumerate([(42, "a"), (42, "b"), (43, "a")]):
        answer = Perfect(small)
        config = RulerConfig(tasks=["fwe"], lengths=[1024], samples=2, seed=seed)
        run(small, tmp_path, answer, config, checkpoint=checkpoint)
        assert answer.prompts == 2
        assert len(list(tmp_path.glob("ruler/pred-*"))) == number + 1
    assert len(list(tmp_path.glob("ruler/data-*"))) == 2
    (facts, *_) = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("ruler/data-*/facts.json")))
    assert facts["tokenizer"] == small.tokenizer.fingerprint


def test_scoring_needs_every_prediction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 of 3"):
        PredictionFile(tmp_path, 1024, "vt").read(3)


def test_bos_counts_and_is_not_doubled(small: Small) -> None:
    plain, with_bos = Encoder(small.tokenizer), Encoder(small.tokenizer, bos=1)
    assert with_bos("sky") == [1, *plain("sky")] and with_bos.count("sky") == plain.count("sky") + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tasks": []}, "must not be empty"), ({"tasks": ["qa_1"]}, "qa_1 needs"), ({"samples": 0}, "at least 1")],
)
def test_bad_settings_are_refused_first(
    small: Small, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = RulerConfig(**{"lengths": [1024], "samples": 1, **changes})
    with pytest.raises(UserError, match=message):
        run(small, tmp_path, Perfect(small), config)
    assert not list(tmp_path.iterdir())
