"""Whether a stage fits, and the fastest set of memory switches with which it would."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

from conf.gpus import GIB, Gpu
from conf.schema import EngineConfig, PlanConfig
from launch.plan_job import accumulation_of, heaviest, with_engine
from model.memory import Job, StepMemory, step_memory
from model.schedule import describe
from model.step_time import Rates, StepTime, step_time

# Beside tensors: CUDA's context and libraries, NCCL's buffers for each group, and what lies between tensors.
CONTEXT = 1.0 * GIB
NCCL = 1.0 * GIB
FRAGMENTS = 0.03  # of the peak
MLP_TILE = 16_384  # what is suggested
CHANGE_COST = 0.01  # a switch must save this share of the step's time to be worth a change of the configuration


@dataclass(frozen=True)
class Forecast:
    """One stage on one kind of GPU. Sizes in bytes; `needed` is of one GPU, `host` of the whole machine."""

    job: Job
    gpu: Gpu
    memory: StepMemory
    time: StepTime
    tokens: int  # of an optimizer step
    host: int
    reason: str  # why it does not fit; empty: it does

    @property
    def overhead(self) -> int:
        return overhead(self.job, self.memory)

    @property
    def needed(self) -> int:
        return self.memory.peak + self.overhead

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def attention(self) -> str:
        return describe(self.job.plans)


def overhead(job: Job, memory: StepMemory) -> int:
    """Bytes beside tensors."""
    return int(CONTEXT + (NCCL if job.world > 1 else 0) + FRAGMENTS * memory.peak)


def forecast(config: PlanConfig, stage: str, gpu: Gpu, rates: Rates) -> Forecast:
    """The stage as configured, in the heaviest attention plan that it goes through."""
    return _forecast(config, stage, heaviest(config, stage, config.launch.nproc), gpu, rates)


def suggest(config: PlanConfig, stage: str, gpu: Gpu, rates: Rates) -> tuple[list[str], Forecast] | None:
    """The settings to change for the stage to fit at the highest speed, and its forecast; None: nothing fits."""
    job = heaviest(config, stage, config.launch.nproc)
    return _fastest(config, stage, job, _choices(config, job), gpu, rates)


def quicker(config: PlanConfig, stage: str, gpu: Gpu, rates: Rates) -> tuple[list[str], Forecast] | None:
    """For a stage that fits: switches to take back because memory is left, and its forecast; None: all needed."""
    job = heaviest(config, stage, config.launch.nproc)
    found = _fastest(config, stage, job, _relaxed(config.engine, job), gpu, rates)
    return found if found is not None and found[0] else None


def _fastest(
    config: PlanConfig, stage: str, job: Job, choices: Iterable[tuple[EngineConfig, int]], gpu: Gpu, rates: Rates
) -> tuple[list[str], Forecast] | None:
    """Of the choices that fit; each changed setting must be worth it."""
    best: tuple[float, list[str], Forecast] | None = None
    for engine, parallel in choices:
        changed = deepcopy(config)
        changed.engine, changed.mesh.sequence_parallel = engine, parallel
        found = _forecast(changed, stage, replace(with_engine(job, engine), parallel=parallel), gpu, rates)
        changes = _changes(config, changed)
        cost = found.time.total / found.tokens * (1 + CHANGE_COST * len(changes))
        if found.fits and (best is None or cost < best[0]):
            best = cost, changes, found
    return None if best is None else best[1:]


def _forecast(config: PlanConfig, stage: str, job: Job, gpu: Gpu, rates: Rates) -> Forecast:
    memory = step_memory(job)
    accumulation = accumulation_of(config, stage, job.world)
    time = step_time(job, gpu, rates, memory, accumulation)
    tokens = job.tokens * accumulation * (job.world // job.parallel)
    host = memory.host * job.world
    needed, reason = memory.peak + overhead(job, memory), ""
    if needed > gpu.memory:
        reason = f"{needed / GIB:.1f} GiB of {gpu.memory / GIB:.0f}"
    elif config.host_gib and host > config.host_gib * GIB:
        reason = f"{host / GIB:.1f} GiB of host memory, of {config.host_gib:.0f}"
    return Forecast(job, gpu, memory, time, tokens, host, reason)


def _choices(config: PlanConfig, job: Job) -> Iterator[tuple[EngineConfig, int]]:
    """Every combination of switches that is at least as sparing as the configuration's own."""
    now, world = config.engine, job.world
    stages = [stage for stage in (0, 1, 2, 3) if stage >= now.zero_stage and (stage or now.precision == "fp32")]
    checkpointing = ["none", "selective", "full"]
    parallel = [size for size in range(job.parallel, world + 1) if _shares(job, size)]
    for values in itertools.product(
        stages if world > 1 else [now.zero_stage, *([2] if now.zero_stage < 2 else [])],
        checkpointing[checkpointing.index(now.checkpointing) :],
        _from(now.offload_checkpoints),
        [now.mlp_tile] if now.mlp_tile else [0, MLP_TILE],
        _from(now.offload_optimizer),
        _from(now.offload_param),
        parallel,
    ):
        stage, keep, offload, tile, optimizer, params, size = values
        if (offload and keep == "none") or (params and stage < 3) or (optimizer and stage < 2):
            continue
        engine = replace(
            now, zero_stage=stage, checkpointing=keep, offload_checkpoints=offload, mlp_tile=tile,
            offload_optimizer=optimizer, offload_param=params,
        )  # fmt: skip
        yield engine, size


def _relaxed(now: EngineConfig, job: Job) -> Iterator[tuple[EngineConfig, int]]:
    """Every combination of memory switches that is at most as sparing as `now`, which is one of them."""
    checkpointing = ["none", "selective", "full"]
    for keep, offload, tile, optimizer, params, loss in itertools.product(
        checkpointing[: checkpointing.index(now.checkpointing) + 1],
        {False, now.offload_checkpoints},
        {0, now.mlp_tile},
        {False, now.offload_optimizer},
        {False, now.offload_param},
        {"auto", now.loss},
    ):
        if offload and keep == "none":
            continue
        engine = replace(
            now, checkpointing=keep, offload_checkpoints=offload, mlp_tile=tile, offload_optimizer=optimizer,
            offload_param=params, loss=loss,
        )  # fmt: skip
        yield engine, job.parallel


def _shares(job: Job, size: int) -> bool:
    """Whether `size` ranks can share a sequence and its heads."""
    model = job.model
    kv_fits = not (model.num_kv_heads % size and size % model.num_kv_heads)
    return job.world % size == 0 and model.num_heads % size == 0 and job.seq_len % size == 0 and kv_fits


def _from(switch: bool) -> list[bool]:
    return [True] if switch else [False, True]


def _changes(before: PlanConfig, after: PlanConfig) -> list[str]:
    """`key=value` of what differs."""
    old, new = vars(before.engine), vars(after.engine)
    changes = [f"engine.{key}={str(new[key]).lower()}" for key in old if old[key] != new[key]]
    if before.mesh.sequence_parallel != after.mesh.sequence_parallel:
        changes.append(f"mesh.sequence_parallel={after.mesh.sequence_parallel}")
    return changes
