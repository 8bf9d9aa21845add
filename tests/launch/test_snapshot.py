from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conf.compose import compose
from conf.load import load_train_config
from launch import snapshot
from launch.packages import PACKAGES, ROOT


def test_the_copy_runs_by_itself(tmp_path: Path) -> None:
    """`python -m` inside it finds the copy, with the files that are no Python, and not the original."""
    code = snapshot.save_code(tmp_path)
    assert sorted(path.name for path in code.iterdir()) == sorted(["COMMIT", *PACKAGES])
    for name in ("conf/recipe/smoke.yaml", "model/moba/triton_rule.json"):
        assert (code / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(code.rglob("*.pyc"))
    command = [sys.executable, "-m", "launch.cli", "train", "recipe=smoke", "out=x", "dry_run=true"]
    done = subprocess.run([*command, "data.sets.text.source=x"], cwd=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = subprocess.run([sys.executable, "-c", "import launch, train; print(launch.__file__, train.__file__)"],
                          cwd=code, capture_output=True, text=True)  # fmt: skip
    assert seen.stdout.split() == [f"{code}/launch/__init__.py", f"{code}/train/__init__.py"]


def test_the_same_code_is_copied_once_and_other_code_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for name in PACKAGES:
        (source / name).mkdir(parents=True)
        (source / name / "__init__.py").write_text("")
    monkeypatch.setattr(snapshot, "ROOT", source)
    first = snapshot.save_code(tmp_path / "run")
    assert snapshot.save_code(tmp_path / "run") == first
    (source / "train" / "__init__.py").write_text("x = 1\n")
    assert snapshot.save_code(tmp_path / "run") != first
    assert (first / "train" / "__init__.py").read_text() == ""
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_a_job_needs_no_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    config = compose(
        "train", ["recipe=smoke", "out=runs/x", "data.sets.text.source=texts", "data.sets.text.path=set"]
    )
    path = snapshot.save_job_config(config, tmp_path / "runs" / "x")
    job = load_train_config(path)
    assert job.out == str(tmp_path / "runs" / "x")
    assert job.data.sets["text"].path == str(tmp_path / "set")
    assert job.data.sets["text"].source == str(tmp_path / "texts")
    assert (config.out, config.data.sets["text"].path) == ("runs/x", "set")  # untouched
    assert snapshot.save_job_config(config, path.parent) == path
    config.max_steps = 3
    assert snapshot.save_job_config(config, path.parent) != path and load_train_config(path).max_steps is None
    config.data.sets["text"].source = "stdlib"  # a name, no path
    assert snapshot.with_absolute_paths(config).data.sets["text"].source == "stdlib"
