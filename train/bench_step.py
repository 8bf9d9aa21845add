"""Worker of `moba bench step`: `python -m train.bench_step CONFIG_YAML ROWS_JSONL` under torchrun.

Measures whole optimizer steps through the engine and the `train_step` of a training run, on synthetic tokens: one
document per data-parallel rank. Rows already in ROWS_JSONL are skipped, so that a worker which died of one row is
started again for the rest. Exit codes: 0 done, 2 bad input, 70 out of memory among several processes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from conf.constants import EXIT_USER_ERROR
from conf.errors import UserError, complain
from conf.inherit import stage_ropes
from conf.load import to_typed
from conf.process import follow_parent, leave
from conf.schema import StepBenchConfig, TrainConfig
from model.schedule import describe, plan
from train.bench_cases import STAGE, Case, cases_of, train_config
from train.bench_inputs import check_loss, describe_case, random_weights, rates, synthetic
from train.engine import DeepSpeedEngine, build_engine, build_model, init_distributed
from train.execution import execution_of
from train.live_memory import LiveMemory
from train.loop import Run, train_step
from train.mesh import Mesh
from train.metrics import MetricsLog
from train.signals import StopSignal
from train.state import TrainState, fill_model, reset_optimizer
from train.step_parts import Timeline, communication, time_parts

EXIT_OUT_OF_MEMORY = 70
LEARNING_RATE = 1e-6


class Timed(NamedTuple):
    """One step: wall-clock seconds, what `train_step` returned, and seconds by part and phase if asked for."""

    seconds: float
    sums: Tensor
    parts: dict[str, dict[str, float]]


class Bench:
    """Runs cases one after the other; keeps the engine as long as its settings stay the same."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.engine: DeepSpeedEngine | None = None
        self.memory = LiveMemory() if mesh.device.type == "cpu" else None
        if self.memory is not None:  # it makes torch import its compiler, which fails inside ZeRO-3's construction
            importlib.import_module("torch._dynamo")
        self._key, self._stage = "", 0

    def measure(self, case: Case) -> dict[str, Any]:
        """One row of the results, without predictions. Raises torch.OutOfMemoryError."""
        config = train_config(case, self.mesh.dp_world)
        with contextlib.nullcontext() if self.memory is None else self.memory:
            self._build(config)
        run = self._run(config)
        batch = synthetic(case.seq_len, config.model.vocab_size, self.mesh.dp_rank)
        batches = [batch.pin_memory() if self.memory is None else batch]  # as the loader hands them over
        plans = plan(config.stages[STAGE].attention, config.model.num_layers, 0.0)

        def step(engine: Any = None) -> Tensor:
            run.engine = engine or self.engine
            return train_step(run, batches, plans, LEARNING_RATE)

        for _ in range(case.config.warmup):
            step()
        self._reset_peak()
        timed = self._steps(step, case.config)
        sums = timed[-1].sums
        peak, reserved = self._peak(step)
        check_loss(sums, config)
        parts = timed[-1].parts or (self._timed(step, True).parts if case.config.parts == "after" else {})
        seconds = [one.seconds for one in timed]
        row = {"seq_len": case.seq_len, "plan": describe(plans), "fits": True, "loss": float(sums[0] / sums[1])}
        row |= rates(case, config, plans, statistics.median(seconds), self.mesh)
        row |= {"step_s": seconds, "peak_bytes": peak, "reserved_bytes": reserved}
        if parts:
            row |= {"parts": parts, "communication_s": communication(step, self.mesh, self.synchronize)}
        return row

    def _steps(self, step: Callable[..., Tensor], config: StepBenchConfig) -> list[Timed]:
        """One after the other as in a run, never waiting for the device; each alone if its parts are timed."""
        if config.parts == "within":
            return [self._timed(step, True) for _ in range(config.steps)]
        self.synchronize()
        start = time.perf_counter()
        for _ in range(config.steps):
            sums = step()
        self.synchronize()
        return [Timed((time.perf_counter() - start) / config.steps, sums.cpu(), {})]

    def _timed(self, step: Callable[..., Tensor], with_parts: bool) -> Timed:
        """One step between two moments at which all devices are idle."""
        self.synchronize()
        start = time.perf_counter()
        timeline = Timeline(self.mesh.device) if with_parts else None
        sums = step() if timeline is None else time_parts(self.engine, timeline, step)
        self.synchronize()
        return Timed(time.perf_counter() - start, sums.cpu(), timeline.seconds() if timeline else {})

    def _run(self, config: TrainConfig) -> Run:
        return Run(
            config, config.stages[STAGE], self.engine, self.mesh, TrainState(STAGE), iter(()), MetricsLog(),
            StopSignal(), evaluate=lambda plans: {}, save=lambda: None,
        )  # fmt: skip

    def cannot_follow(self, case: Case) -> bool:
        """Whether `case` needs a new process: what ZeRO-3 holds outlives its engine."""
        config = train_config(case, self.mesh.dp_world)
        return self.engine is not None and self._stage == 3 and _engine_key(config) != self._key

    def _build(self, config: TrainConfig) -> None:
        key, self._stage = _engine_key(config), config.engine.zero_stage
        if key != self._key or self.engine is None:
            self.drop()
            self.engine = build(config, self.mesh)
            self._key = key

    def drop(self) -> None:
        """Free the engine and everything it holds."""
        if self.engine is not None:
            self.engine.destroy()
        self.engine = None
        gc.collect()
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        if self.memory is None:
            torch.cuda.reset_peak_memory_stats()

    def _peak(self, step: Callable[[], Tensor]) -> tuple[int, int]:
        """Bytes in tensors at the highest point, and bytes the allocator then held; on a CPU of one more step."""
        if self.memory is None:
            return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.memory.reset_peak()
        with self.memory:
            step()
        return self.memory.peak, self.memory.peak

    def synchronize(self) -> None:
        """Wait until every rank's device is idle."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        self.mesh.barrier()


def _engine_key(config: TrainConfig) -> str:
    """Equal for configurations that one engine can run."""
    stage = config.stages[STAGE]
    return repr((config.model, config.optim, config.engine, config.mesh, stage.attention.backend))


def build(config: TrainConfig, mesh: Mesh) -> DeepSpeedEngine:
    """The engine of a training run, as `train.run.build` makes it, with random weights."""
    model = build_model(config, STAGE, stage_ropes(config.stages)[STAGE], 1, execution_of(config, mesh))
    if config.engine.zero_stage < 3:
        model.to_empty(device=mesh.device)
    fill_model(model, random_weights(config, mesh.device), "random weights")
    engine = build_engine(model, config, 1, 1, mesh)
    reset_optimizer(engine, 0)
    return engine


def measure_rows(config: StepBenchConfig, results: Path, mesh: Mesh) -> int:
    """Measure the rows that `results` lacks. Returns the exit code; 0 may leave rows for another start."""
    bench, cases = Bench(mesh), cases_of(config)
    for index in range(mesh.broadcast(len(read_rows(results))), len(cases)):
        case, error = cases[index], ""
        if bench.cannot_follow(case):
            return 0
        try:
            row = bench.measure(case)
        except (torch.OutOfMemoryError, MemoryError) as caught:
            error = f"out of memory: {str(caught).splitlines()[0]}"
        except (FloatingPointError, RuntimeError, UserError) as caught:
            error = " ".join(f"{type(caught).__name__}: {caught}".split())[:400]
        if error:  # here, where the exception and all that it holds are gone
            row = {"seq_len": case.seq_len, "plan": case.plan, "error": error}
            row["fits"] = not error.startswith("out of memory")
            row["peak_bytes"] = torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else 0
            bench.drop()
        if mesh.is_main or error:
            write_row(results, {"index": index} | row | describe_case(case, mesh))
        if error and mesh.world > 1:  # the other ranks wait in a collective that will never come
            return EXIT_OUT_OF_MEMORY
    bench.drop()
    return 0


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Rows of `results` in order; of one that several ranks wrote (each its own error), the first."""
    rows: dict[int, dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else ():
        row = json.loads(line)
        rows.setdefault(row.pop("index"), row)
    return [rows[index] for index in sorted(rows)]


def write_row(results: Path, row: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    status = row.get("error") or f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak_bytes'] / 2**30:.2f} GiB"
    print(f"{row['case']}: {status}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run as a worker; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    follow_parent()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about what DeepSpeed calls
    try:
        config = to_typed(OmegaConf.load(arguments[0]), StepBenchConfig, arguments[0])
        mesh = init_distributed(config.mesh.sequence_parallel)
        code = measure_rows(config, Path(arguments[1]), mesh)
    except UserError as error:
        complain(error)
        return EXIT_USER_ERROR
    if code:
        leave(code)  # no farewell to ranks that hang
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main())
