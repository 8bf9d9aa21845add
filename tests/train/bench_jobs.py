"""What the tests of the step benchmark run in worker processes. Module-level functions only."""

from __future__ import annotations

from typing import Any

from conf.schema import EngineConfig, ModelConfig, StepBenchConfig


def settings(model: ModelConfig, engine: EngineConfig, parallel: int = 1, **changes: Any) -> StepBenchConfig:
    config = StepBenchConfig(model=model, engine=engine, **changes)
    config.mesh.sequence_parallel = parallel
    return config


def measured_peak(model: ModelConfig, engine: EngineConfig, seq_len: int, parallel: int) -> int:
    """Live bytes at the highest point of a full-attention step of this rank."""
    from train.bench_cases import cases_of
    from train.bench_step import Bench
    from train.engine import init_distributed

    config = settings(model, engine, parallel, sweep=[f"{seq_len}/full"], steps=1, warmup=1, parts="none")
    bench = Bench(init_distributed(parallel))
    row = bench.measure(cases_of(config)[0])
    bench.drop()
    return int(row["peak_bytes"])


def measure_all(config: StepBenchConfig, results: str, break_row: int = -1) -> int:
    """`measure_rows`; row `break_row` of this call runs out of memory."""
    from pathlib import Path

    import torch

    from train import bench_step
    from train.engine import init_distributed

    genuine, calls = bench_step.train_step, 0

    def limited(run: Any, *args: Any) -> Any:
        nonlocal calls
        if run.stage.seq_len == break_row:
            calls += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return genuine(run, *args)

    bench_step.train_step = limited
    try:
        return bench_step.measure_rows(config, Path(results), init_distributed(config.mesh.sequence_parallel))
    finally:
        bench_step.train_step = genuine
