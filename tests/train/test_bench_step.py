from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
import torch

from conf.errors import UserError
from conf.schema import EngineConfig, ModelConfig, StepBenchConfig
from model.flops import attended_pairs, matmul_parameters
from model.schedule import LayerPlan
from tests.gloo import GlooPool
from tests.train.bench_jobs import measure_all, settings
from train.bench_cases import cases_of
from train.bench_inputs import check_loss
from train.bench_step import EXIT_OUT_OF_MEMORY, read_rows
from train.live_memory import LiveMemory
from train.step_parts import BACKWARD, FORWARD, RECOMPUTE, Timeline

TINY = ModelConfig("llama", 512, 64, 128, 2, 4, 2, tie_embeddings=True)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_parts_and_useful_flops(pool1: GlooPool, tmp_path: Path) -> None:
    sweep = ["256/full/engine.checkpointing:full/engine.mlp_tile:64", "256/32x3/engine.checkpointing:selective"]
    config = settings(TINY, EngineConfig(), sweep=[*sweep, "256/32x3/parts:within"], steps=2)
    assert pool1(measure_all, config, str(tmp_path / "rows")) == [0]
    rows = rows_of(tmp_path / "rows")
    assert [row["case"] for row in rows] == [*sweep, "256/32x3"]
    assert [row["plan"] for row in rows] == ["full", "moba 32x3", "moba 32x3"]
    for row in rows:
        parts = row["parts"]
        assert set(parts) == {"attention", "embedding", "loss", "mlp", "norm", "optimizer", "other", "projections"}
        assert all(parts[name][FORWARD] > 0 for name in ("attention", "mlp", "loss", "norm", "projections"))
        again = row["engine"]["checkpointing"] != "none"
        assert (parts["projections"].get(RECOMPUTE, 0) > 0) == again
        assert parts["attention"][BACKWARD] > 0 and row["communication_s"] == 0
        assert sum(sum(phases.values()) for phases in parts.values()) < 20 * max(row["step_s"])
        assert row["tokens_per_s"] == pytest.approx(256 / median(row["step_s"])) and row["peak_bytes"] > 0
    plan = LayerPlan("moba", 32, 3)
    pairs = 3 * 2 * 4 * 64 * attended_pairs(256, plan)  # three passes, two layers, two products of width 64 each
    assert rows[1]["flops"] == rows[2]["flops"] == 6 * matmul_parameters(TINY) * 256 + pairs


def test_a_row_that_does_not_fit_is_reported_and_the_next_one_follows(pool1: GlooPool, tmp_path: Path) -> None:
    config = settings(TINY, EngineConfig(), sweep=["64/full", "128/full", "96/full"], steps=1, parts="none")
    assert pool1(measure_all, config, str(tmp_path / "rows"), 128) == [0]
    first, second, third = rows_of(tmp_path / "rows")
    assert "error" not in first and "error" not in third and third["seq_len"] == 96
    assert not second["fits"] and second["error"].startswith("out of memory: CUDA out of memory")


def test_a_second_start_goes_on_after_the_rows_that_are_there(pool1: GlooPool, tmp_path: Path) -> None:
    config = settings(TINY, EngineConfig(), sweep=["64/full", "96/full"], steps=1, parts="none")
    (tmp_path / "rows").write_text('{"index": 0}\n')
    pool1(measure_all, config, str(tmp_path / "rows"))
    assert [row.get("seq_len") for row in rows_of(tmp_path / "rows")] == [None, 96]


def test_two_processes_share_a_sequence(pool2: GlooPool, tmp_path: Path) -> None:
    config = settings(TINY, EngineConfig(zero_stage=2), 2, sweep=["128/32x2"], steps=1)
    assert pool2(measure_all, config, str(tmp_path / "rows")) == [0, 0]
    (row,) = rows_of(tmp_path / "rows")
    assert row["processes"] == 2 and row["communication_s"] > 0
    assert row["tokens_per_s"] == pytest.approx(128 / row["step_s"][0])


def test_ranks_that_fail_together_are_one_row(pool2: GlooPool, tmp_path: Path) -> None:
    config = settings(TINY, EngineConfig(zero_stage=3), sweep=["64/full", "128/full"], steps=1, parts="none")
    assert pool2(measure_all, config, str(tmp_path / "rows"), 64) == [EXIT_OUT_OF_MEMORY] * 2
    assert len(rows_of(tmp_path / "rows")) == 2 and len(read_rows(tmp_path / "rows")) == 1
    assert pool2(measure_all, config, str(tmp_path / "rows")) == [0, 0]
    assert ["error" in row for row in read_rows(tmp_path / "rows")] == [True, False]


def test_another_engine_after_zero_3_waits_for_a_new_process(pool1: GlooPool, tmp_path: Path) -> None:
    sweep = ["64/full", "96/full", "64/full/engine.checkpointing:full"]
    config = settings(TINY, EngineConfig(zero_stage=3), sweep=sweep, steps=1, parts="none")
    for expected in (2, 3):
        assert pool1(measure_all, config, str(tmp_path / "rows")) == [0]
        assert len(read_rows(tmp_path / "rows")) == expected


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("full", "TOKENS/PLAN"),
        ("64/dense", "full or BLOCKxTOPK"),
        ("64/full/engine.zero_stge:1", "zero_stge"),
        ("64/full/optim.clip:1", "optim.clip"),
        ("64/full/engine.zero_stage:x", "64/full/engine.zero_stage:x"),
    ],
)
def test_bad_rows_are_named(row: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        cases_of(StepBenchConfig(model=TINY, sweep=[row]))


def test_lengths_times_plans() -> None:
    cases = cases_of(StepBenchConfig(model=TINY, lengths=[64, 128], plans=["full", "32x2"]))
    assert [case.text for case in cases] == ["64/full", "64/32x2", "128/full", "128/32x2"]
    assert (cases[1].config.attention.block_size, cases[1].config.attention.topk) == (32, 2)


def test_a_wrong_loss_is_no_measurement() -> None:
    from train.bench_cases import train_config

    config = train_config(cases_of(StepBenchConfig(model=TINY, lengths=[64], plans=["full"]))[0], 1)
    check_loss(torch.tensor([6.2 * 64, 64, 0, 0, 0, 0.5]), config)
    for sums in (
        [4.0 * 64, 64, 0, 0, 0, 0.5],
        [6.2 * 64, 64, 0, 0, 0, float("nan")],
        [6.2 * 64, 64, 0, 0, 0, 0.0],
    ):
        with pytest.raises(FloatingPointError, match="random tokens"):
            check_loss(torch.tensor(sums), config)


def test_live_memory_counts_storages_once_and_forgets_them() -> None:
    with LiveMemory() as memory:
        x = torch.empty(250)
        view = x.view(10, 25)
        assert memory.live == 1000
        y = torch.cat([x, x])
        assert memory.live == memory.peak == 3000
        del x
        assert memory.live == 3000  # the view holds it
        del view
        assert (memory.live, memory.peak) == (2000, 3000)
        memory.reset_peak()
        del y
    assert (memory.live, memory.peak) == (0, 2000)


def test_timeline_gives_each_moment_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    timeline = Timeline(torch.device("cpu"))
    timeline.mark()  # 0: other
    timeline.open("attention", FORWARD)  # 1
    timeline.open("projections", FORWARD)  # 2
    timeline.close("projections", FORWARD)  # 3: attention again
    timeline.close("attention", FORWARD)  # 4: other
    timeline.phase = BACKWARD
    timeline.open("mlp", BACKWARD)  # 5
    timeline.open("norm", RECOMPUTE)  # 6
    timeline.close("norm", RECOMPUTE)  # 7: between modules of a block that recomputes itself: attention
    timeline.open("mlp", RECOMPUTE)  # 8, stopped early and never closed
    timeline.open("norm", BACKWARD)  # 9
    timeline.close("norm", BACKWARD)  # 10: the mlp's backward pass
    timeline.close("mlp", BACKWARD)  # 11
    timeline.mark()  # 12
    assert timeline.seconds() == {
        "other": {FORWARD: 2.0, BACKWARD: 1.0},
        "attention": {FORWARD: 2.0, RECOMPUTE: 1.0},
        "projections": {FORWARD: 1.0},
        "mlp": {BACKWARD: 2.0, RECOMPUTE: 1.0},
        "norm": {RECOMPUTE: 1.0, BACKWARD: 1.0},
    }
