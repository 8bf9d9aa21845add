"""Sequence parallelism changes no loss, no gradient and no chosen block; and sends what the formula says."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.paths import RunPaths
from model.execution import PLAIN
from model.sequence_parallel import bytes_per_layer, kv_copies
from tests.gloo import GlooPool
from tests.tolerances import assert_close
from tests.train import jobs as base
from tests.train import sp_jobs as jobs

CASES = [
    *itertools.product((1, 2, 4), (1,), ("full", "moba", "hybrid")),
    *itertools.product((2,), (2,), ("moba", "hybrid")),
]


@cache
def alone(num_kv_heads: int, rows: int, plan: str) -> jobs.Result:
    """One process without a process group."""
    batch = jobs.batch_of(rows)
    return jobs.losses_and_gradients(jobs.build(num_kv_heads, PLAIN), batch, plan, batch.num_valid)


def test_the_case_is_hard_enough() -> None:
    """A document lies across every cut of 2 and 4 ranks, masks differ, blocks must be chosen."""
    for rows in jobs.ROWS:
        batch = jobs.batch_of(rows)
        for cut in (24, 48, 72):
            assert (batch.positions[:, cut] > 0).all()
        assert (batch.labels[:, :24] >= 0).sum() == rows
        assert (batch.labels[:, 72:] >= 0).sum() > 20 * rows
    assert int(alone(2, 2, "moba")["sums"][3]) == jobs.TRAILING
    assert (alone(2, 2, "moba")["choices"][0] >= 0).any()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_one_process(pool4: GlooPool, size: int) -> None:
    """Four processes in groups of 1, 2 and 4; two groups of 2 work side by side."""
    for rank, results in enumerate(pool4(jobs.exchange_cases, size, CASES)):
        for case, result in zip(CASES, results, strict=True):
            num_kv_heads, rows, plan = case
            where = f"rank {rank} of groups of {size}, {num_kv_heads} kv heads, {rows} rows, {plan}"
            want = alone(*case)
            torch.testing.assert_close(result["sums"], want["sums"], rtol=1e-6, atol=0, msg=where)
            assert result["grads"].keys() == want["grads"].keys()
            for name, grad in want["grads"].items():
                assert_close(result["grads"][name], grad, f"{where}: {name}")
            heads = slice(result["sp_rank"] * jobs.HEADS // size, (result["sp_rank"] + 1) * jobs.HEADS // size)
            assert result["choices"].keys() == want["choices"].keys()
            for layer, ids in want["choices"].items():
                got = result["choices"][layer].sort(-1).values
                assert torch.equal(got, ids[:, heads].sort(-1).values), f"{where}: choices of layer {layer}"
            # forward and backward, and the probe's forward: half as much again
            each = bytes_per_layer(rows * jobs.SEQ_LEN, jobs.HEADS, num_kv_heads, jobs.HEAD_DIM, 4, size, passes=3)
            assert result["bytes_sent"] == len(jobs.PLANS[plan]) * each, where


@cache
def trained_alone() -> jobs.Result:
    return jobs.train_alone(jobs.train_config(0, 1))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_like_one_process(pool4: GlooPool, zero_stage: int) -> None:
    """Two data-parallel ranks times two sequence-parallel ones, clipping in each step."""
    for rank, result in enumerate(pool4(jobs.train, jobs.train_config(zero_stage, 2))):
        jobs.assert_trained_alike(result, trained_alone(), f"rank {rank}")


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunPaths(out).metrics.read_text().splitlines()]


def test_a_whole_stage(pool1: GlooPool, pool2: GlooPool, prepared: Path, tmp_path: Path) -> None:
    """Real data, held-out loss before and after, trailing loss and log: the rows of one process."""
    configs = {size: base.chain_config(str(tmp_path / str(size)), str(prepared)) for size in (1, 2)}
    for size, config in configs.items():
        config.mesh.sequence_parallel = size
        config.stages["short"].micro_batch = 2
    assert pool1(jobs.run_stage, configs[1], "short")[0][0] == 0
    (code, said), (other, silent) = pool2(jobs.run_stage, configs[2], "short")
    assert (code, other, silent) == (0, 0, "")
    # 2 rows of 32 tokens, 2 heads of 8 and 1 kv head sent twice, fp32: half of it goes away, there and back
    assert bytes_per_layer(64, 2, 1, 8, 4, 2) == 2 * 32 * (2 + 2 + 2 + 2) * 8 * 4 // 2
    assert "sequence parallelism over 2 ranks: each sends 0.00781 MiB per layer and micro-batch" in said
    want, got = (rows_of(tmp_path / str(size)) for size in (1, 2))
    assert [(row["kind"], row["step"]) for row in got] == [(row["kind"], row["step"]) for row in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, float) and key != "tokens_per_s":
                assert ours[key] == pytest.approx(value, rel=1e-5), key
            elif key != "tokens_per_s":
                assert ours[key] == value, key
    assert any("trailing_loss" in row for row in want if row["kind"] == "train")
    assert any("trailing_loss" in row for row in want if row["kind"] == "eval")


def test_bytes_per_layer_by_hand() -> None:
    """1M tokens, 32 heads of 128 in bf16, 8 kv heads, 8 ranks: 2 x 10 heads' worth and back, 7/8 of it sent."""
    assert bytes_per_layer(2**20, 32, 8, 128, 2, 8) == 2 * 2**17 * (32 + 8 + 8 + 32) * 128 * 2 * 7 // 8
    assert bytes_per_layer(2**20, 32, 8, 128, 2, 16) == 2 * 2**16 * (32 + 16 + 16 + 32) * 128 * 2 * 15 // 16
    assert bytes_per_layer(2**20, 32, 8, 128, 2, 1) == 0


def test_kv_heads_are_shared_or_copied() -> None:
    assert [kv_copies(kv, size) for kv, size in ((4, 1), (4, 2), (4, 4), (2, 4), (1, 4))] == [1, 1, 1, 2, 4]
    with pytest.raises(ValueError, match="6 kv heads over 4 ranks"):
        kv_copies(6, 4)
