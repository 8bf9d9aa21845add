"""Needle grids, several checkpoints in one call, and pages made from earlier results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conf.paths import RunPaths
from conf.schema import EvalConfig, GateConfig, GenerateConfig, NeedleConfig, RulerConfig
from eval.run import run
from eval.task_plots import short_length
from eval.task_suites import needle_tasks
from tests.eval.build import Small
from tests.eval.test_run import Tags, config, read


@pytest.fixture(scope="module")
def two(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    run(config(small, out, checkpoint=[str(small.hf), str(small.hf)]))
    return out


def test_comparison(two: Path) -> None:
    folders = sorted(path for path in two.iterdir() if (path / "eval").is_dir())
    assert [path.name[:2] for path in folders] == ["1-", "2-"]
    assert all((path / "report.html").is_file() for path in folders)
    markup = RunPaths(two).report.read_text()
    tags = Tags(markup)
    assert not tags.open and not {tag for tag, _ in tags.found} & {"script", "link", "iframe", "a"}
    assert re.findall(r"<h2>(.*?)</h2>", markup) == ["Overview", "Loss", "RULER", "Checkpoints"]
    loss = read(folders[0], "loss")["plans"]["moba"]["heldout"]["loss"]
    assert markup.count(f"<td>{loss:.4f} ±") == 2  # both checkpoints are the same
    assert "(1)" in markup and "(2)" in markup and "Not comparable" not in markup
    assert RunPaths(two).plots.joinpath("compare-position.png").is_file()


def test_report_from_earlier_results(two: Path, tmp_path: Path, small: Small) -> None:
    folders = sorted(str(path) for path in two.iterdir() if (path / "eval").is_dir())
    path = Path(folders[1]) / "eval" / "loss.json"
    content = json.loads(path.read_text())
    content["seq_len"] += 1
    content["checkpoint"]["name"] = "<b>other</b>"
    path.write_text(json.dumps(content))
    run(EvalConfig(checkpoint=folders, out=str(tmp_path), suite="report"))
    markup = RunPaths(tmp_path).report.read_text()
    assert "losses are at different lengths" in markup and "&lt;b&gt;other" in markup and "<b>other" not in markup
    before = RunPaths(Path(folders[0])).report.read_text()
    RunPaths(Path(folders[0])).report.unlink()
    run(EvalConfig(checkpoint=folders[0], out=folders[0], suite="report"))
    assert RunPaths(Path(folders[0])).report.read_text() == before


def test_needle_grid(small: Small, tmp_path: Path) -> None:
    settings = NeedleConfig(lengths=[1024, 512], depths=3, samples=2)
    run(config(small, tmp_path, suite="needle", needle=settings))
    needle: dict[str, Any] = read(tmp_path, "needle")
    assert needle["depths"] == [0, 50, 100] and needle["lengths"] == [512, 1024] and needle["haystack"] == "noise"
    assert {name: [len(row) for row in grid] for name, grid in needle["grids"].items()} == {
        "full": [2, 2, 2],
        "moba": [2, 2, 2],
    }
    rows = []
    for depth in needle["depths"]:
        (path,) = tmp_path.glob(f"eval/needle/data-*/512/needle_{depth:03d}/validation.jsonl")
        rows.append([json.loads(line) for line in path.read_text().splitlines()])
    for depth, samples in zip(needle["depths"], rows, strict=True):
        for sample in samples:
            lines = sample["input"].split("\n")[1:-1]
            (at,) = (i for i, line in enumerate(lines) if line.startswith("One of the special magic"))
            assert at == round(depth / 100 * (len(lines) - 1)) and sample["outputs"][0] in lines[at]
    markup = RunPaths(tmp_path).report.read_text()
    assert "<h2>Needle in a haystack</h2>" in markup and "Longer than the checkpoint&#x27;s 128 tokens" in markup
    assert RunPaths(tmp_path).plots.joinpath("needle.png").is_file()


def test_needle_tasks_and_lengths() -> None:
    assert needle_tasks(1) == ["needle_000"] and needle_tasks(3) == ["needle_000", "needle_050", "needle_100"]
    assert len(set(needle_tasks(40))) == 40
    assert [short_length(n) for n in (1 << 20, 131_072, 1000)] == ["1M", "128K", "1,000"]


def test_local_scores_have_a_file_of_their_own(small: Small, tmp_path: Path) -> None:
    ruler = RulerConfig(tasks=["niah_single_2"], lengths=[512], samples=1, data="local")
    run(config(small, tmp_path, suite="ruler", ruler=ruler))
    assert (
        not (RunPaths(tmp_path).eval / "ruler.json").exists() and not (RunPaths(tmp_path).eval / "ruler").exists()
    )
    assert read(tmp_path, "ruler-local")["benchmark"] == "ruler-local"
    markup = RunPaths(tmp_path).report.read_text()
    assert "<h2>RULER-local</h2>" in markup and "not comparable with published ones" in markup


def test_chunks_change_no_answer(small: Small, tmp_path: Path) -> None:
    ruler = RulerConfig(tasks=["niah_single_1"], lengths=[600], samples=3)
    answers = []
    for chunk in (0, 100):
        out = tmp_path / str(chunk)
        run(config(small, out, suite="ruler", ruler=ruler, generate=GenerateConfig(batch=2, chunk=chunk)))
        files = sorted(out.glob("eval/ruler/pred-*/600/niah_single_1.jsonl"))
        answers.append([path.read_text() for path in files])
    assert answers[0] == answers[1] and len(answers[0]) == 2


def test_what_ifs_on_a_checkpoint_without_moba(small: Small, tmp_path: Path) -> None:
    from conf.schema import EvalAttentionConfig

    gate = GateConfig(queries=16, block_sizes=[16, 32], topks=[2])
    run(config(small, tmp_path, suite="gate", gate=gate, attention=EvalAttentionConfig(kind="full")))
    result = read(tmp_path, "gate")
    assert result["layers"] == [] and [row["block_size"] for row in result["grid"]] == [32, 16]
    assert all(0 < row["kept"] <= row["best"] <= 1 for row in result["grid"])
    assert "What other settings would keep" in RunPaths(tmp_path).report.read_text()
