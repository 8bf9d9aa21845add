from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import AttentionConfig, StageConfig
from launch.preview import attention_text, num_steps, print_plan
from launch.stages import Progress


def test_attention_text_names_every_change() -> None:
    assert attention_text(AttentionConfig(), 4) == "full"
    moba = AttentionConfig(kind="moba", block_size=64, topk=4, full_last_layers=1)
    assert attention_text(moba, 4) == "0-2 moba 64x4, 3 full"
    moba = AttentionConfig(
        kind="moba", block_size=64, topk=4, full_after=0.9, topk_warmup=[16, 8], topk_warmup_until=0.2
    )
    assert attention_text(moba, 2) == "moba 64x16; from 10%: moba 64x8; from 20%: moba 64x4; from 90%: full"


def test_num_steps() -> None:
    assert num_steps(StageConfig(seq_len=512, tokens=81_920, global_batch=16)) == 10


def test_plan_counts_all_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["recipe=smoke", f"out={tmp_path}", "data.sets.text.source=x", "launch=hostfile", "launch.nodes=2"]
    print_plan(compose("train", [*asked, "launch.nproc=2", "mesh.sequence_parallel=2"]), Progress())
    said = capsys.readouterr().out
    assert "4 processes (2 data-parallel x 2 sequence-parallel)" in " ".join(said.split())
    assert "4 = 2x1x2" in said
