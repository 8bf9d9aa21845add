"""Memory switches beside ZeRO-3 and sequence parallelism: none changes the weights after three clipped steps."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.paths import checkpoint_name
from conf.schema import TrainConfig
from tests.gloo import GlooPool
from tests.train import sp_jobs as jobs

OFFLOADED = {"offload_optimizer": True, "offload_param": True}
EVERYTHING = {"checkpointing": "selective", "offload_checkpoints": True, "mlp_tile": 7, **OFFLOADED}
CASES: dict[str, dict[str, Any]] = {
    "full": {"checkpointing": "full"},
    "full, moved, tiled": {"checkpointing": "full", "offload_checkpoints": True, "mlp_tile": 7},
    "selective": {"checkpointing": "selective"},
    "tiled": {"mlp_tile": 7},
    "parameters and optimizer moved": OFFLOADED,
    "everything": EVERYTHING,
    "fused loss": {"loss": "fused"},
    "everything, fused loss": {**EVERYTHING, "loss": "fused"},
}


@cache
def alone() -> jobs.Result:
    return jobs.train_alone(jobs.train_config(0, 1))


def switched(zero_stage: int, sequence_parallel: int, switches: dict[str, Any]) -> TrainConfig:
    config = jobs.train_config(zero_stage, sequence_parallel)
    for key, value in switches.items():
        assert hasattr(config.engine, key)
        setattr(config.engine, key, value)
    return config


def trained(pool: GlooPool, zero_stage: int, sequence_parallel: int, switches: dict[str, Any]) -> None:
    for rank, result in enumerate(pool(jobs.train, switched(zero_stage, sequence_parallel, switches))):
        jobs.assert_trained_alike(result, alone(), f"rank {rank}")


@pytest.mark.parametrize("case", CASES)
def test_with_zero_3_and_sequence_parallelism(pool4: GlooPool, case: str) -> None:
    """Two data-parallel ranks times two sequence-parallel ones."""
    trained(pool4, 3, 2, CASES[case])


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_the_optimizer_may_move_in_other_stages(pool2: GlooPool, zero_stage: int) -> None:
    trained(pool2, zero_stage, 1, {"offload_optimizer": True, "checkpointing": "selective", "mlp_tile": 7})


def test_without_zero(pool2: GlooPool) -> None:
    trained(pool2, 0, 2, {"checkpointing": "full", "offload_checkpoints": True, "mlp_tile": 7})


MOVES = [  # (ZeRO stage, switches) that save after step 2, and those that load
    ((3, OFFLOADED), (1, {})),
    ((1, {}), (3, OFFLOADED)),
    ((1, {"offload_optimizer": True}), (2, {"offload_optimizer": True})),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("saver", "loader"), MOVES)
def test_checkpoints_know_nothing_of_it(
    pool2: GlooPool, tmp_path: Path, saver: tuple, loader: tuple, precision: str
) -> None:
    """Saved on one side after two steps, loaded bit for bit on the other, and trained on."""
    config = switched(saver[0], 1, {**saver[1], "precision": precision})
    config.max_steps = 2
    saved = pool2(jobs.train, config, "", str(tmp_path))[0]
    path = str(tmp_path / checkpoint_name(2))
    config = switched(loader[0], 1, {**loader[1], "precision": precision})
    config.max_steps = 2
    for result in pool2(jobs.train, config, path):
        assert result["optimizer_step"] == 2
        for name, tensor in saved["tensors"].items():
            np.testing.assert_array_equal(result["tensors"][name], tensor, err_msg=name)
    config.max_steps = jobs.STEPS
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for result in pool2(jobs.train, config, path):
        np.testing.assert_allclose(result["loss"], alone()["loss"][2:], rtol=tolerance)
        np.testing.assert_allclose(result["grad_norm"], alone()["grad_norm"][2:], rtol=4 * tolerance)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_ranks_may_have_different_numbers_of_tiles(pool2: GlooPool, checkpointing: str) -> None:
    """Under ZeRO-3 each gathering of weights is collective: tiles must not gather."""
    config = switched(3, 1, {"checkpointing": checkpointing})
    whole = pool2(jobs.unequal_rows, config, 1000)
    tiled = pool2(jobs.unequal_rows, config, 5)  # 4 tiles and 7
    assert whole[0] == whole[1]
    for norms in tiled:
        np.testing.assert_allclose(norms, whole[0], rtol=1e-5)
