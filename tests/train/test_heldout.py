"""What `eval.buckets` and `eval.gate` add to the rows of an evaluation while training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.paths import RunPaths
from tests.gloo import GlooPool
from tests.train import jobs as base
from tests.train import sp_jobs as jobs

GATE = ["gate_blocks_back", "gate_nearest", "gate_never", "gate_entropy", "gate_load_max"]


def evaluations(
    pool: GlooPool, out: Path, prepared: Path, size: int, zero_stage: int, **switches: Any
) -> list[Any]:
    config = base.chain_config(str(out), str(prepared))
    config.mesh.sequence_parallel, config.engine.zero_stage = size, zero_stage
    config.stages["short"].micro_batch = 2
    config.stages["short"].attention.kind = "moba"
    config.stages["short"].attention.block_size, config.stages["short"].attention.topk = 16, 2
    for name, value in switches.items():
        setattr(config.eval, name, value)
    assert pool(jobs.run_stage, config, "short")[0][0] == 0
    rows = [json.loads(line) for line in RunPaths(out).metrics.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "eval"]


def test_buckets_and_gate(pool1: GlooPool, pool2: GlooPool, prepared: Path, tmp_path: Path) -> None:
    plain = evaluations(pool1, tmp_path / "plain", prepared, 1, 0)
    rows = evaluations(pool1, tmp_path / "one", prepared, 1, 0, buckets=4, gate=True)
    shared = evaluations(pool2, tmp_path / "two", prepared, 2, 3, buckets=4, gate=True)
    added = {"bucket_ends", "bucket_losses", "bucket_tokens", *GATE}
    for before, row, other in zip(plain, rows, shared, strict=True):
        assert row.keys() - before.keys() == added and other.keys() == row.keys()
        assert all(row[key] == before[key] for key in before if not key.endswith("_loss"))
        for key in ("heldout_loss", "trailing_loss"):  # looking on changes nothing
            assert row[key] == pytest.approx(before[key], rel=1e-6)
        length = row["seq_len"]
        assert row["bucket_ends"] == [length // 4, length // 2, 3 * length // 4, length]
        assert sum(row["bucket_tokens"]) > 0 and len(row["gate_never"]) == 2
        total = sum(a * b for a, b in zip(row["bucket_losses"], row["bucket_tokens"], strict=True))
        last = row["bucket_losses"][-1]
        assert (
            total > 0 and abs(last - row["trailing_loss"]) < 1
        )  # the trailing tokens are some of the last bucket's
        assert all(0 <= value <= 1 for value in row["gate_nearest"] if value is not None)
        assert row["gate_entropy"][0] is not None
        for key in ("bucket_losses", *GATE):
            assert other[key] == pytest.approx(row[key], rel=1e-4), key
