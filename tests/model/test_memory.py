"""The planner's peaks against those measured on a GPU, and the ledger itself.

`tests/train/test_step_memory.py` has steps that really run.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.schema import EngineConfig, ModelConfig
from model.memory import PARTS, Job, Ledger, step_memory
from model.memory_attention import attention_bytes
from model.schedule import FULL, LayerPlan

LLAMA_1B = ModelConfig("llama", 128_256, 2048, 8192, 16, 32, 8, tie_embeddings=True)


def _gib(engine: EngineConfig, seq_len: int, plan: LayerPlan) -> float:
    return step_memory(Job(LLAMA_1B, (plan,) * 16, seq_len, engine)).peak / 2**30


# Peaks of `moba bench step` on one H200, GiB (benchmarks/results/step-h200.json).
LONG = EngineConfig(
    checkpointing="full", offload_checkpoints=True, mlp_tile=16_384, fused="liger", loss="tiled"
)  # fmt: skip
KEPT, SELECTIVE = EngineConfig(fused="liger"), EngineConfig(fused="liger", checkpointing="selective")
ON_H200 = [
    (KEPT, 8192, FULL, 32.16),
    (KEPT, 8192, LayerPlan("moba", 512, 3), 32.25),
    (KEPT, 32_768, FULL, 60.43),
    (KEPT, 32_768, LayerPlan("moba", 2048, 3), 60.81),
    (KEPT, 32_768, LayerPlan("moba", 512, 8), 61.75),
    (SELECTIVE, 131_072, FULL, 47.08),
    (SELECTIVE, 131_072, LayerPlan("moba", 512, 8), 51.48),
    (SELECTIVE, 131_072, LayerPlan("moba", 4096, 12), 53.30),
    (SELECTIVE, 262_144, LayerPlan("moba", 512, 8), 81.67),
    (LONG, 1_048_576, LayerPlan("moba", 512, 8), 74.44),
    (LONG, 1_048_576, LayerPlan("moba", 4096, 12), 79.11),
]


@pytest.mark.parametrize(("engine", "seq_len", "plan", "measured"), ON_H200)
def test_peaks_measured_on_a_gpu(engine: EngineConfig, seq_len: int, plan: LayerPlan, measured: float) -> None:
    assert abs(_gib(engine, seq_len, plan) / measured - 1) < 0.10


def test_peak_with_one_full_layer_at_a_million_tokens() -> None:
    """80.60 GiB: cuDNN's gradients of keys and values have 32 heads before they are summed to 8."""
    plans = (LayerPlan("moba", 512, 8),) * 15 + (FULL,)
    job = Job(LLAMA_1B, plans, 1_048_576, replace(LONG, loss="auto"))
    assert abs(step_memory(job).peak / 2**30 / 80.60 - 1) < 0.05


def test_peak_measured_on_two_gpus() -> None:
    job = Job(LLAMA_1B, (LayerPlan("moba", 512, 8),) * 16, 262_144, SELECTIVE, world=2, parallel=2)
    assert abs(step_memory(job).peak / 2**30 / 45.11 - 1) < 0.10
    # The 8B shape at 64K tokens, ZeRO-3, optimizer in host memory, the last three layers full: 22.23 GiB.
    eight = ModelConfig("llama", 128_256, 4096, 14_336, 32, 32, 8)
    engine = EngineConfig(
        zero_stage=3, checkpointing="full", mlp_tile=16_384, offload_optimizer=True, fused="liger"
    )
    plans = (LayerPlan("moba", 4096, 12),) * 29 + (FULL,) * 3
    job = Job(eight, plans, 65_536, engine, world=2, parallel=2)
    assert abs(step_memory(job).peak / 2**30 / 22.23 - 1) < 0.10
    # At 512K tokens, the optimizer on the GPUs, checkpoints in host memory: 97.46 GiB.
    engine = replace(engine, offload_optimizer=False, offload_checkpoints=True)
    job = Job(eight, plans, 524_288, engine, world=2, parallel=2)
    assert abs(step_memory(job).peak / 2**30 / 97.46 - 1) < 0.05


def test_each_switch_saves_memory() -> None:
    plan, length = LayerPlan("moba", 512, 8), 131_072
    chain = [
        EngineConfig(),
        EngineConfig(checkpointing="selective"),
        EngineConfig(checkpointing="full"),
        EngineConfig(checkpointing="full", offload_checkpoints=True),
        EngineConfig(checkpointing="full", offload_checkpoints=True, mlp_tile=4096),
    ]
    peaks = [_gib(engine, length, plan) for engine in chain]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks), peaks


def test_offloaded_checkpoints_lie_in_host_memory() -> None:
    job = Job(LLAMA_1B, (FULL,) * 16, 8192, EngineConfig(checkpointing="full", offload_checkpoints=True))
    assert step_memory(job).host == 16 * 8192 * 2048 * 2
    assert step_memory(replace(job, engine=EngineConfig(checkpointing="full"))).host == 0


def test_kept_block_ids_are_narrow() -> None:
    job = Job(LLAMA_1B, (), 65_536, EngineConfig())
    few, many = attention_bytes(job, LayerPlan("moba", 512, 3)), attention_bytes(job, LayerPlan("moba", 128, 3))
    assert few.ids == many.ids == 4 * 65_536 * 32 * 2
    assert few.packed_ids == few.ids // 4 and many.packed_ids == many.ids // 2


def test_moba_that_chooses_everything_is_full_attention() -> None:
    job = Job(LLAMA_1B, (), 4096, EngineConfig())
    assert attention_bytes(job, LayerPlan("moba", 512, 8)) == attention_bytes(job, FULL)


def test_ledger_remembers_the_highest_point() -> None:
    ledger = Ledger(moment="first")
    a = ledger.take("weights", 10)
    ledger.moment = "second"
    ledger.touch("loss", 5, 2)
    ledger.give(a)
    ledger.take("weights", 12)
    assert (ledger.peak, ledger.peak_moment, ledger.at_peak["loss"]) == (17, "second", 7)
    with pytest.raises(KeyError):
        ledger.give(a)
    assert set(ledger.at_peak) <= set(PARTS)


def test_deterministic_full_attention_has_lists() -> None:
    """It runs on MoBA's kernels: 8.54 GiB for 5.78 in one layer of this shape at 128K on an H200."""
    usual, fixed = (
        step_memory(Job(LLAMA_1B, (FULL,) * 16, 131_072, replace(SELECTIVE, deterministic=each))).peak / 2**30
        for each in (False, True)
    )
    assert 1 < fixed - usual < 4
    assert (
        attention_bytes(Job(LLAMA_1B, (FULL,), 524_288, replace(SELECTIVE, deterministic=True)), FULL).lists == 0
    )
