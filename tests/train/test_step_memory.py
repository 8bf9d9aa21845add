"""The planner's peaks against the exact count of live bytes in steps that really run."""

from __future__ import annotations

import pytest

from conf.schema import EngineConfig, ModelConfig
from model.memory import Job, step_memory
from model.schedule import FULL
from tests.gloo import GlooPool
from tests.train.bench_jobs import measured_peak

TOLERANCE = 0.05  # of the measured peak
SHAPES = {
    "layers": ModelConfig("llama", 512, 128, 256, 4, 4, 2, tie_embeddings=True),
    "wide": ModelConfig("llama", 512, 64, 512, 2, 4, 4, tie_embeddings=True),
    "heads": ModelConfig("llama", 512, 64, 64, 2, 4, 2, head_dim=64, tie_embeddings=True),
    "untied": ModelConfig("llama", 2048, 64, 128, 2, 4, 2),
}
SEQ_LEN = 1024

CASES = [
    ("layers", EngineConfig(precision="fp32")),
    ("layers", EngineConfig(precision="fp32", zero_stage=0, checkpointing="full")),
    ("layers", EngineConfig(checkpointing="selective")),
    ("layers", EngineConfig(checkpointing="full", mlp_tile=128)),
    ("wide", EngineConfig()),
    ("wide", EngineConfig(checkpointing="full")),
    ("heads", EngineConfig(checkpointing="selective", zero_stage=2)),
    ("untied", EngineConfig(mlp_tile=256)),
    ("layers", EngineConfig(loss="fused", checkpointing="full")),
    ("untied", EngineConfig(loss="fused", precision="fp32")),
]


@pytest.mark.parametrize(("shape", "engine"), CASES)
def test_peak_is_that_of_a_real_step(shape: str, engine: EngineConfig, pool1: GlooPool) -> None:
    _compare(pool1, shape, engine, 1)


@pytest.mark.parametrize("parallel", [1, 2])
def test_peak_with_two_processes(parallel: int, pool2: GlooPool) -> None:
    _compare(pool2, "layers", EngineConfig(checkpointing="selective", zero_stage=2), parallel)


def _compare(pool: GlooPool, shape: str, engine: EngineConfig, parallel: int) -> None:
    measured = pool(measured_peak, SHAPES[shape], engine, SEQ_LEN, parallel)
    plans = (FULL,) * SHAPES[shape].num_layers
    job = Job(SHAPES[shape], plans, SEQ_LEN, engine, world=pool.world, parallel=parallel, cuda=False)
    predicted = step_memory(job)
    assert sum(predicted.parts.values()) == predicted.peak
    for peak in measured:
        assert abs(predicted.peak / peak - 1) < TOLERANCE, (predicted, measured)
