from pathlib import Path

import pytest

from launch.cli import main
from tests.data.build import write_store


def test_each_stage_is_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "set", [[k % 900 + 1] * (k % 150 + 1) for k in range(200)], [[1] * 200])
    stage = "stages.long.data"
    command = ["prepare", "inspect", "recipe=smoke", f"out={tmp_path / 'run'}", "launch.nproc=2"]
    sets = [f"data.sets.text.path={tmp_path / 'set'}", f"{stage}.packing=best_fit", f"+{stage}.domains.few=0.5"]
    rule = [f"+{stage}.rules.few={{set: text, max_length: 9}}"]
    assert main([*command, *sets, *rule]) == 0
    text = capsys.readouterr().out
    for part in (
        "short: 16 rows of 64 tokens",
        "long: 16 rows of 128 tokens",
        "few",
        "left out",
        "slowest of 2 ranks",
    ):
        assert part in text, part
    picture = tmp_path / "run" / "plots" / "mixture.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_keys_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "inspect", "recipe=smoke", "stages.short.data.packin=x"]) == 2
    assert "did you mean stages.short.data.packing" in capsys.readouterr().err
