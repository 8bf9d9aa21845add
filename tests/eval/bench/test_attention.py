"""The attention benchmark without its GPU: rows, refusals, the stored results and their picture."""

import json
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.schema import BenchConfig
from eval.bench.shapes import CASES, OFFICIAL, Case, Shape, parse_shape

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "attention-h200.json"
ROW = {
    *("seq_len", "num_heads", "num_kv_heads", "head_dim", "block_size", "topk", "documents", "routing"),
    *("fwd_ms", "fwd_bwd_ms", "dense_fwd_ms", "dense_fwd_bwd_ms", "peak_gib", "dense_peak_gib"),
}


def test_rows_read_back_what_they_print():
    assert all(parse_shape(str(shape)) == shape for shape in OFFICIAL)
    assert parse_shape("32768/32/8/128/512/3") == Shape(32768, 32, 8, 128, 512, 3)


@pytest.mark.parametrize(
    "text", ["", "1/2/3", "8192/32/8/128/512/0", "8192/32/8/128/512/x", "8192/32/5/128/512/3"]
)
def test_bad_rows_are_refused(text):
    with pytest.raises(UserError, match="rows"):
        parse_shape(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_refuses_to_run_without_a_gpu():
    from eval.bench.attention import run

    with pytest.raises(UserError, match="Hopper"):
        run(BenchConfig())


def test_packed_and_routed_rows_come_by_themselves_unless_rows_are_named():
    from eval.bench.attention import _cases

    assert _cases(BenchConfig()) == list(CASES)
    assert _cases(BenchConfig(documents=3)) == [Case(shape, 3) for shape in OFFICIAL]
    named = BenchConfig(rows=["32768/32/8/128/512/3"], routing="sink")
    assert _cases(named) == [Case(Shape(32768, 32, 8, 128, 512, 3), 1, "sink")]


def test_own_pairs_are_counted_per_document():
    from eval.bench.attention import _own_pairs

    for length, block in ((1, 16), (16, 16), (50, 16)):
        counted = sum(i // block == j // block and j <= i for i in range(length) for j in range(length))
        assert _own_pairs(length, block) == counted


def test_stored_results_have_their_fields_and_a_picture(tmp_path):
    from eval.bench.picture import draw

    report = json.loads(RESULTS.read_text())
    assert set(report) == {"gpu", "torch", "triton", "commit", "date", "rows"}
    rows = report["rows"]
    shapes = [Shape(*(row[k] for k in Shape.__dataclass_fields__)) for row in rows]
    assert [Case(s, row["documents"], row["routing"]) for s, row in zip(shapes, rows, strict=True)] == list(CASES)
    assert all(set(row) == ROW for row in rows)
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_sampled_rows_agree_with_autograd():
    """The benchmark's own exact samples are right: one query's out and dq, one block's dk and dv."""
    pytest.importorskip("triton")
    from eval.bench.check import _row

    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((8,), (20, 8), (20, 8), (8,))
    )
    q.requires_grad_()
    out = torch.softmax((k @ q) * 0.5, 0) @ v
    (dq,) = torch.autograd.grad(out, q, dout)
    got = _row(q.detach(), k, v, dout, 0.5)
    assert torch.allclose(got[0], out) and torch.allclose(got[1], dq)
    assert torch.allclose(got[2], torch.logsumexp(((k @ q) * 0.5).float(), 0))
