"""Our prediction files as NVIDIA's own scorer reads them, and its scores beside ours.

`official_*` say in our words what RULER v1 does in scripts/eval/evaluate.py (reading, cleaning, empty answers) and
scripts/eval/synthetic/constants.py (the two metrics and which task has which). They share no code with eval.ruler.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conf.schema import RulerConfig
from eval.ruler.run import Encoder, run_ruler
from eval.ruler.score import score_task
from eval.ruler.store import PredictionFile
from eval.ruler.tasks import OFFICIAL
from tests.eval.build import Small

FIELDS = ["index", "pred", "input", "outputs", "others", "truncation", "length"]  # of scripts/pred/call_api.py


def official_score(path: Path, task: str) -> tuple[float, str]:
    """Percent, and the count of empty answers as the summary prints it."""
    predictions, references = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        printable = "".join("\n" if ord(c) < 32 else c for c in row["pred"].strip())
        predictions.append(printable.strip())
        references.append(row["outputs"] if "outputs" in row else [row.get("output", "")])
        _ = row["input"], row.get("others", {}).get("id", row["index"])
    shares = []
    for prediction, wanted in zip(predictions, references, strict=True):
        found = [1.0 if text.lower() in prediction.lower() else 0.0 for text in wanted]
        shares.append(max(found) if task.split("_")[0] == "qa" else sum(found) / len(found))
    empty = f"{sum(not text for text in predictions)}/{len(predictions)}"
    return round(sum(shares) / len(shares) * 100, 2), empty


class Canned:
    """Answers with fixed texts, in turn: right ones, partly right ones, empty ones and control characters."""

    def __init__(self, small: Small) -> None:
        self.small, self.count = small, 0

    def __call__(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            text = self.small.tokenizer.decode(prompt)
            needles = re.findall(r"is: (\d{7})", text)
            answers = [
                "",
                " \t\n",
                " and ".join(needles),
                (needles or ["x"])[0] + "\x01\x1f",
                "NOTHING of it",
                "\x01",
            ]
            found.append(self.small.tokenizer.encode(answers[self.count % len(answers)])[:tokens])
            self.count += 1
        return found


@pytest.fixture(scope="module")
def finished(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("official")
    config = RulerConfig(tasks=["niah_single_1", "fwe"], lengths=[1024], samples=6)
    results = run_ruler(config, Encoder(small.tokenizer), out, {"x": Canned(small)}, {"x": {}}, lambda *_: None)
    return out / results["x"]["predictions"] / "1024", results["x"]["lengths"]["1024"]


def test_fields_and_file_names(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["fwe.jsonl", "niah_single_1.jsonl"]  # NAME.jsonl of its synthetic.yaml, in --data_dir itself
    for path in folder.iterdir():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [list(row) for row in rows] == [FIELDS] * 6
        assert [row["index"] for row in rows] == list(range(6))
        for row in rows:
            assert isinstance(row["pred"], str) and isinstance(row["input"], str)
            assert row["outputs"] and all(isinstance(text, str) for text in row["outputs"])
            assert isinstance(row["others"], dict) and isinstance(row["length"], int)


@pytest.mark.parametrize("task", OFFICIAL)
def test_no_name_is_taken_for_a_chunk(task: str) -> None:
    """Its scorer joins and then removes files that look like NAME-0.jsonl."""
    assert not re.match(r".*[^_]+-\d+\.jsonl", f"{task}.jsonl")


def test_same_scores_and_empty_answers(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, ours = finished
    for task, score in ours["scores"].items():
        theirs, empty = official_score(folder / f"{task}.jsonl", task)
        assert (score, f"{ours['empty'][task]}/6") == (theirs, empty)
    assert 0 < ours["scores"]["niah_single_1"] < 100 and ours["empty"]["niah_single_1"] > 0


@pytest.mark.parametrize("task", ["niah_multivalue", "vt", "cwe", "fwe", "qa_1", "qa_2"])
def test_metrics_on_fixed_samples(task: str, tmp_path: Path) -> None:
    cases = [
        ("Paris and LYON", ["paris", "Lyon", "Nice"]),
        ("", ["a"]),
        ("\x00\x1fAB\x07CD ", ["ab", "cd", "abcd"]),
        ("ünïcode ÜNÏCODE\u2028x", ["ünïcode", "x"]),
        ("\u00a0\x1e", ["z", "y", "x", "w", "v", "u", "t"]),
        ("1234567, 12345678", ["1234567", "7654321", "45678"]),
    ]
    path = tmp_path / "1024" / f"{task}.jsonl"
    path.parent.mkdir()
    rows = [
        dict(zip(FIELDS, (i, pred, "q", outputs, {}, -1, 9), strict=True))
        for i, (pred, outputs) in enumerate(cases)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts, references = PredictionFile(tmp_path, 1024, task).read(len(cases))
    assert score_task(task, texts, references) == official_score(path, task)[0]
