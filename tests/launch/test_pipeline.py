"""The real thing, small: the chain of the smoke recipe under torchrun, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.paths import RunPaths
from launch.cli import main
from launch.packages import ROOT
from launch.stages import Progress, read_progress


@pytest.mark.slow
def test_train_stop_resume_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index, path in enumerate(sorted(ROOT.glob("*/*.py"))[:40]):
        (texts / f"{index}.py").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    run = RunPaths(tmp_path / "run")
    command = ["train", "recipe=smoke", f"out={run.root}", f"data.sets.text.source={texts}"]

    assert main([*command, "max_steps=3"]) == 0
    assert read_progress(run) == Progress(3, "short", False)

    # inside a stage, over two borders, on another number of processes
    assert main([*command, "launch.nproc=2"]) == 0
    assert read_progress(run) == Progress(10, "full", True)
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["stage"] for row in steps] == ["short"] * 4 + ["long"] * 4 + ["full"] * 2
    assert {row["plan"] for row in steps if row["stage"] == "long"} == {"0 moba 16x2, 1 full"}
    assert steps[-1]["tokens"] == 4096

    # done is done
    capfd.readouterr()
    assert main(["train", f"out={run.root}"]) == 0
    assert capfd.readouterr().out.endswith("10 of 10 steps done\n")

    assert main(["export", f"checkpoint={run.root}", f"out={run.hf}"]) == 0
    assert (run.hf / "config.json").is_file()
