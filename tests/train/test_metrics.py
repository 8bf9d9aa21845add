"""Rows on disk: what a resume keeps, what wandb gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.schema import WandbConfig
from train.metrics import JsonlSink, Terminal, WandbSink, drop_rows_after


def rows_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"kind": "train", "step": {step}}}\n' for step in (1, 2, 2, 3, 4)) + '{"kind": "tr')
    drop_rows_after(path, 2)
    assert rows_in(path) == [1, 2, 2]
    sink = JsonlSink(path, 2)
    sink.write({"kind": "train", "step": 3})
    assert rows_in(path) == [1, 2, 2, 3]  # readable before the file is closed
    sink.close()
    JsonlSink(path, -1).close()
    assert rows_in(path) == []


def test_plain_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("train.metrics.time.monotonic", lambda: now[0])
    terminal = Terminal(total_tokens=100_000, done_tokens=0, stage="long")
    row = {"kind": "train", "step": 7, "tokens": 40_000, "stage": "long", "loss": 2.5, "tokens_per_s": 1000.0}
    terminal.write(row)
    assert capsys.readouterr().out == ""
    now[0] += 15
    terminal.write(row)
    assert capsys.readouterr().out == "[long] step 7  loss 2.5000  1,000 tokens/s  40 %  1:00 left\n"
    terminal.write(row)
    assert capsys.readouterr().out == ""
    terminal.close()


@pytest.mark.slow
def test_wandb_offline_needs_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandbSink(WandbConfig(mode="offline"), tmp_path, {"seed": 1})
    sink.write({"kind": "train", "step": 1, "loss": 2.0})
    sink.write({"kind": "eval", "step": 1, "heldout_loss": 2.1})
    sink.close()
    identity = (tmp_path / "wandb" / "run_id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
