"""Full attention and MoBA on the same weights: the switch is a change of plan and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.schema import AttentionConfig
from tests.gloo import GlooPool
from tests.train import init_jobs, jobs

FULL = AttentionConfig()
MOBA = AttentionConfig(kind="moba", block_size=16, topk=2, backend="reference")


@pytest.mark.parametrize(("before", "after"), [(FULL, MOBA), (MOBA, FULL)], ids=["to_moba", "to_full"])
def test_a_switch_leaves_weights_and_optimizer_alone(
    pool1: GlooPool, tmp_path: Path, before: AttentionConfig, after: AttentionConfig
) -> None:
    (tmp_path / jobs.TOKENIZER).mkdir()
    [result] = pool1(init_jobs.switch, str(tmp_path), before, after)
    print(f"loss {result['loss'][0]:.5f} before the switch, {result['loss'][1]:.5f} after it")
    assert result["saved_is_loaded"] and result["switch_changed_nothing"] and result["moments_are_there"]
    assert result["loss_in_old_plan"] == result["loss"][0]
    assert result["loss"][1] != result["loss"][0]  # documents are longer than two blocks: the plan shows
    assert result["loss"][1] == pytest.approx(result["loss"][0], abs=0.05)
    assert len(result["goes_on"]) == jobs.STEPS - 3
