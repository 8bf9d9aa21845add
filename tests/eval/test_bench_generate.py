"""`moba bench generate` on a CPU: what it writes, and what keeps it from writing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval import bench_generate
from eval.bench_generate_check import CheckFailed, check_queries
from launch.cli import main
from model.schedule import FULL, LayerPlan

TINY = [
    "model=tiny",
    "lengths=[150,70]",
    "block_size=32",
    "topk=2",
    "chunk=64",
    "full_up_to=100",
    "decode_up_to=100",
]


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "g.json"
    assert main(["bench", "generate", *TINY, f"out={out}"]) == 0
    report = json.loads(out.read_text())
    short, long = report["rows"]
    assert (short["length"], long["length"]) == (70, 150)
    assert report["date"] and report["commit"] and report["model"]["dtype"] == "float32"
    assert short["full_prefill_s"] > 0 and not short["speedup_is_of_sum"]
    assert "full_prefill_s" not in long and long["speedup_is_of_sum"] and "decode_full_ms" not in long
    parts = long["moba_prefill_s"] - long["moba_attention_s"] + long["full_attention_s"]
    assert long["full_prefill_sum_s"] == pytest.approx(parts)
    assert long["speedup"] == pytest.approx(parts / long["moba_prefill_s"])
    assert short["decode_attention_bytes"] == 2 * 71 * 2 * 16 * 4  # k and v, tokens, kv heads, head_dim, fp32
    assert min(short["decode_moba_ms"], short["decode_moba_attention_us"], short["decode_full_ms"]) > 0
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "* not run" in capsys.readouterr().out


def test_wrong_attention_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_generate.part_attention
    monkeypatch.setattr(bench_generate, "part_attention", lambda *args: right(*args) * 1.01)
    with pytest.raises(CheckFailed, match="moba prefill of 150 tokens: relative error"):
        main(["bench", "generate", *TINY, f"out={tmp_path / 'g.json'}"])
    assert not (tmp_path / "g.json").exists()


@pytest.mark.parametrize("kind", ["full", "moba"])
def test_wrong_decoding_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    right = bench_generate.decode_attention
    wrong = {"full": 1.0, "moba": 1.0, kind: 1.01}
    monkeypatch.setattr(bench_generate, "decode_attention", lambda *args: right(*args) * wrong[args[-1].kind])
    with pytest.raises(CheckFailed, match=f"{kind} decode: relative error"):
        main(["bench", "generate", *TINY, f"out={tmp_path / 'g.json'}"])


def test_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", "model=tiny", "block_size=40"]) == 2
    assert main(["bench", "generate", "model=tiny", "lengths=[]"]) == 2
    assert "block_size=40" in capsys.readouterr().err


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, heads, 16, generator=g) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("plan", [FULL, LayerPlan("moba", 32, 3)], ids=["full", "moba"])
def test_the_gate_knows_right_from_wrong(plan: LayerPlan) -> None:
    from model.moba.suffix import suffix_attention

    q, k, v = inputs()
    out = suffix_attention(q[-90:], k, v, query_lengths=[90], key_lengths=[200], layer_plan=plan)
    assert check_queries("x", q[-90:], k, v, out, plan) < 1e-5
    other = LayerPlan("moba", 32, 2)
    wrong = suffix_attention(q[-90:], k, v, query_lengths=[90], key_lengths=[200], layer_plan=other)
    with pytest.raises(CheckFailed, match="x: relative error"):
        check_queries("x", q[-90:], k, v, wrong, plan)
    out[-1] = float("nan")
    with pytest.raises(CheckFailed):
        check_queries("x", q[-90:], k, v, out, plan)
