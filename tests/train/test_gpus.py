"""Two GPUs train as one does: data parallel and sequence parallel, every ZeRO stage, offloading."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from conf.schema import TrainConfig
from tests.gloo import GlooPool
from tests.train import sp_jobs as jobs
from train.determinism import set_deterministic

pytestmark = pytest.mark.multi_gpu

EVERYTHING = {
    "checkpointing": "selective", "offload_checkpoints": True, "mlp_tile": 7, "offload_optimizer": True,
    "offload_param": True,
}  # fmt: skip
MOVED = {"checkpointing": "full", "offload_checkpoints": True, "offload_optimizer": True}
FP32: list[tuple[int, int, dict[str, Any]]] = [
    *((stage, parallel, {}) for stage in (0, 1, 2, 3) for parallel in (1, 2)),
    (2, 1, MOVED),
    (3, 2, EVERYTHING),
    (3, 1, {"loss": "tiled"}),
]
BF16 = [(stage, parallel) for stage in (1, 2, 3) for parallel in (1, 2)]
# Of losses, gradient norms and weights. AdamW turns rounding into sign where a gradient is all rounding: the norm
# of the difference of weights is compared, not its elements.
TOLERANCE = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (5e-3, 5e-2, 1e-1)}


def config_of(zero_stage: int, parallel: int, switches: dict[str, Any], precision: str) -> TrainConfig:
    """bf16: our kernels, and heads that they take; fp32: the portable path, which compiles nothing."""
    config = jobs.train_config(zero_stage, parallel)
    config.engine.precision = precision
    config.stages["one"].attention.backend = "varlen"
    if precision == "bf16":
        config.stages["one"].attention.backend, config.model.head_dim = "auto", 64
    for key, value in switches.items():
        assert hasattr(config.engine, key)
        setattr(config.engine, key, value)
    return config


@cache
def alone(pool: GlooPool, precision: str) -> jobs.Result:
    return pool(jobs.train, config_of(1, 1, {}, precision))[0]


def compare(pools: dict[int, GlooPool], config: TrainConfig) -> None:
    precision = config.engine.precision
    want, (losses, norms, weights) = alone(pools[1], precision), TOLERANCE[precision]
    for rank, got in enumerate(pools[2](jobs.train, config)):
        assert got["valid"] == want["valid"]
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=losses, err_msg=f"rank {rank}: loss")
        np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=norms, err_msg=f"rank {rank}: norm")
        for name, tensor in want["tensors"].items():
            if name.startswith(":"):
                error = np.linalg.norm(got["tensors"][name] - tensor) / np.linalg.norm(tensor)
                assert error < weights, f"rank {rank}: {name}: {error:.1e}"


@pytest.mark.parametrize(("zero_stage", "parallel", "switches"), FP32)
def test_fp32(gpu_pools: dict[int, GlooPool], zero_stage: int, parallel: int, switches: dict[str, Any]) -> None:
    compare(gpu_pools, config_of(zero_stage, parallel, switches, "fp32"))


@pytest.mark.parametrize(("zero_stage", "parallel"), BF16)
def test_bf16(gpu_pools: dict[int, GlooPool], zero_stage: int, parallel: int) -> None:
    compare(gpu_pools, config_of(zero_stage, parallel, {}, "bf16"))


@pytest.mark.parametrize(
    ("precision", "zero_stage", "parallel", "switches"),
    [
        ("fp32", 1, 1, {}),
        ("bf16", 1, 2, {}),
        ("bf16", 3, 1, {"loss": "tiled", "checkpointing": "selective"}),
        ("bf16", 2, 1, {"fused": "liger", "mlp_tile": 7}),
    ],
)
def test_deterministic_runs_are_bit_equal(
    gpu_pools: dict[int, GlooPool], precision: str, zero_stage: int, parallel: int, switches: dict[str, Any]
) -> None:
    """One layer with MoBA, one with full attention; every operation of a step can be deterministic."""
    if switches.get("fused"):
        pytest.importorskip("liger_kernel")
    config, pool = config_of(zero_stage, parallel, switches, precision), gpu_pools[2]
    pool(set_deterministic, True)
    try:
        first, second = (pool(jobs.train, config) for _ in range(2))
    finally:
        pool(set_deterministic, False)
    for one, two in zip(first, second, strict=True):
        assert (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"])
        assert all(np.array_equal(tensor, two["tensors"][name]) for name, tensor in one["tensors"].items())
