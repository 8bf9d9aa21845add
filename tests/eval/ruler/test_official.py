"""RULER's own prompt files in, RULER's own prediction format out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import RulerConfig
from eval.ruler.official import found_lengths
from tests.eval.build import Small
from tests.eval.ruler.test_run import Perfect, lines, run

ROWS: list[dict[str, Any]] = [  # with an index that collides, as RULER writes it
    {"index": 17, "input": f"x {i} is: {1000000 + i}. Ask?", "outputs": [str(1000000 + i)], "length": 900 + i}
    for i in range(5)
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("layout", ["{task}/validation.jsonl", "data/{task}/validation.jsonl", "{task}.jsonl"])
def test_prompts_are_answered(small: Small, tmp_path: Path, layout: str) -> None:
    new = [{**row, "answer_prefix": " Answer:", "token_position_answer": 3} for row in ROWS]
    write(tmp_path / "in" / "1024" / layout.format(task="niah_single_2"), new)
    config = RulerConfig(tasks=["niah_single_2"], lengths=[1024], samples=5, prompts=str(tmp_path / "in"))
    answer = Perfect(small)
    result = run(small, tmp_path / "out", answer, config)["full"]
    assert result["lengths"]["1024"]["scores"] == {"niah_single_2": 100.0} and answer.prompts == 5
    saved = lines(tmp_path / "out", "ruler/pred-*/1024/niah_single_2.jsonl")
    assert [row["index"] for row in saved] == list(range(5))  # collisions would lose four of them
    assert [row["input"] for row in saved] == [row["input"] for row in ROWS]
    assert saved[2]["outputs"] == ["1000002"] and saved[2]["length"] == 902
    again = Perfect(small)
    run(small, tmp_path / "out", again, config)
    assert again.prompts == 0
    assert found_lengths(tmp_path / "in") == [1024] and found_lengths(tmp_path / "none") == []


def test_other_prompts_share_nothing(small: Small, tmp_path: Path) -> None:
    for name, rows in (("a", ROWS), ("b", ROWS[::-1])):
        write(tmp_path / name / "1024" / "vt.jsonl", rows)
        config = RulerConfig(tasks=["vt"], lengths=[1024], samples=5, prompts=str(tmp_path / name))
        answer = Perfect(small)
        run(small, tmp_path / "out", answer, config)
        assert answer.prompts == 5


def test_bad_files_are_refused_first(small: Small, tmp_path: Path) -> None:
    root = tmp_path / "in"
    write(root / "1024" / "vt.jsonl", ROWS)

    def refused(message: str, **changes: Any) -> None:
        values: dict[str, Any] = {
            "tasks": ["vt"],
            "lengths": [1024],
            "samples": 5,
            "prompts": str(root),
            **changes,
        }
        with pytest.raises(UserError, match=message):
            run(small, tmp_path / "out", Perfect(small), RulerConfig(**values))

    refused("has 5 prompts", samples=6)
    refused("no prompts of fwe at 1024", tasks=["fwe"])
    refused("no prompts of vt at 2048", lengths=[2048])
    refused("exclude each other", data="local")
    write(tmp_path / "bad" / "1024" / "vt.jsonl", [{"input": "x"}])
    refused("line 1: no RULER sample", prompts=str(tmp_path / "bad"), samples=1)
