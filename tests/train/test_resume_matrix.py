"""A run that goes on at another world size, ZeRO stage, sequence parallelism and micro-batch: same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.gloo import GlooPool
from tests.train import fault_jobs, jobs
from tests.train.test_run import rows_of

Place = tuple[int, int, int, int]  # world, ZeRO stage, sequence parallel, micro-batch
PLACES: list[Place] = [(1, 0, 1, 4), (2, 1, 1, 1), (2, 3, 1, 2), (2, 2, 2, 2), (2, 3, 2, 1), (1, 3, 1, 1)]


def go(pools: dict[int, GlooPool], out: Path, prepared: Path, place: Place, max_steps: int | None) -> None:
    world, zero_stage, parallel, micro_batch = place
    config = jobs.chain_config(str(out), str(prepared), zero_stage=zero_stage, max_steps=max_steps)
    config.mesh.sequence_parallel, config.stages["long"].micro_batch = parallel, micro_batch
    config.stages["short"].micro_batch = micro_batch
    config.metrics.batch_hash = True
    assert pools[world](fault_jobs.stage_on, config, "short") == [0] * world
    if max_steps is None:
        assert pools[world](fault_jobs.stage_on, config, "long") == [0] * world


@pytest.fixture(scope="module")
def alone(pools: dict[int, GlooPool], prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    go(pools, out, prepared, PLACES[0], None)
    return out


@pytest.mark.parametrize("index", range(len(PLACES)))
def test_resume_elsewhere(
    pools: dict[int, GlooPool], alone: Path, prepared: Path, tmp_path: Path, index: int
) -> None:
    """Steps 1 to 3 at one place, 4 to 12 (over the end of a stage) at the next of the ring."""
    go(pools, tmp_path, prepared, PLACES[index], 3)
    go(pools, tmp_path, prepared, PLACES[(index + 1) % len(PLACES)], None)
    want, got = rows_of(alone, "train"), rows_of(tmp_path, "train")
    assert [row["batch_hash"] for row in got] == [row["batch_hash"] for row in want]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in got], [r[key] for r in want], rtol=1e-4, err_msg=key)
