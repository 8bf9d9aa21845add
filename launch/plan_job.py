"""From a training configuration to the planner's job, and its prediction."""

from __future__ import annotations

from dataclasses import replace

from conf.gpus import Gpu
from conf.schema import EngineConfig, TrainConfig
from model.memory import Job, StepMemory, step_memory
from model.schedule import plan
from model.step_time import Rates, StepTime, step_time


def job_of(config: TrainConfig, stage: str, world: int, *, fraction: float = 0.0, cuda: bool = True) -> Job:
    """One optimizer step of `stage`, in the attention plan at `fraction` of its tokens."""
    settings = config.stages[stage]
    plans = plan(settings.attention, config.model.num_layers, fraction)
    return Job(
        config.model, plans, settings.seq_len, config.engine, rows=settings.micro_batch, world=world,
        parallel=config.mesh.sequence_parallel, cuda=cuda,
    )  # fmt: skip


def heaviest(config: TrainConfig, stage: str, world: int) -> Job:
    """The job of the attention plan that takes most memory, of all that the stage goes through."""
    attention = config.stages[stage].attention
    moments = {0.0, attention.topk_warmup_until, attention.full_after}
    jobs = [job_of(config, stage, world, fraction=moment) for moment in sorted(moments) if moment < 1.0]
    return max(jobs, key=lambda job: step_memory(job).peak)


def accumulation_of(config: TrainConfig, stage: str, world: int) -> int:
    """Micro-batches of each rank in an optimizer step."""
    settings = config.stages[stage]
    return max(1, settings.global_batch // (world // config.mesh.sequence_parallel * settings.micro_batch))


def predict(
    config: TrainConfig, stage: str, world: int, gpu: Gpu | None, rates: Rates | None, *, cuda: bool = True
) -> tuple[StepMemory, StepTime | None]:
    """Peak memory of a step and, for a known GPU, its time."""
    job = job_of(config, stage, world, cuda=cuda)
    memory = step_memory(job)
    if gpu is None or rates is None:
        return memory, None
    return memory, step_time(job, gpu, rates, memory, accumulation_of(config, stage, world))


def with_engine(job: Job, engine: EngineConfig) -> Job:
    return replace(job, engine=engine)
