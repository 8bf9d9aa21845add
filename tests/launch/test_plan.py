"""`moba plan` and the reports of `moba bench step`, without starting anything but one small benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.gpus import GIB, gpu_named, gpu_of_device
from conf.schema import PlanConfig
from launch.cli import main
from launch.plan import resolve
from launch.plan_fit import forecast, quicker, suggest
from launch.plan_rates import measured_rates
from launch.step_report import merged, print_table
from model.step_time import Rates

RECIPE = ["recipe=quickstart", "model=llama_1b", "engine=bf16", "eval.tokens=0", "launch.nproc=1"]


def long_stage(seq_len: int, *more: str) -> PlanConfig:
    stage = [f"stages.long.{key}" for key in (f"seq_len={seq_len}", f"tokens={4 * seq_len}", "global_batch=1")]
    return resolve([*RECIPE, "~stages.short", "~stages.full", *stage, *more])


def test_short_stage_fits_and_long_one_needs_switches() -> None:
    gpu = gpu_named("h200")
    assert forecast(long_stage(8192), "long", gpu, Rates()).fits
    config = long_stage(1_048_576)
    now = forecast(config, "long", gpu, Rates())
    assert not now.fits and now.needed > gpu.memory
    found = suggest(config, "long", gpu, Rates())
    assert found is not None
    changes, later = found
    assert later.fits and later.needed <= gpu.memory < now.needed
    for key in ("engine.checkpointing=", "engine.mlp_tile="):
        assert any(change.startswith(key) for change in changes), changes
    # what was suggested, set by hand, is what was forecast
    again = forecast(long_stage(1_048_576, *changes), "long", gpu, Rates())
    assert again.needed == later.needed and again.fits


def test_suggestion_minds_host_memory_and_knows_when_to_give_up() -> None:
    gpu = gpu_named("h200")
    found = suggest(long_stage(1_048_576, "host_gib=100"), "long", gpu, Rates())
    assert found is not None and found[1].host <= 100 * GIB
    assert suggest(long_stage(64 * 1_048_576), "long", gpu, Rates()) is None


def test_switches_that_nothing_needs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """At 8K all activations of this shape fit; at 128K some recomputation stays."""
    gpu = gpu_named("h200")
    sparing = ("engine.checkpointing=full", "engine.offload_checkpoints=true", "engine.mlp_tile=4096")
    found = quicker(long_stage(8192, *sparing), "long", gpu, Rates())
    assert found is not None
    changes, later = found
    assert "engine.checkpointing=none" in changes and later.fits
    assert later.time.total < forecast(long_stage(8192, *sparing), "long", gpu, Rates()).time.total
    assert quicker(long_stage(8192), "long", gpu, Rates()) is None
    long = quicker(long_stage(131_072, *sparing), "long", gpu, Rates())
    assert long is not None and long[1].fits and "engine.mlp_tile=0" not in long[0]
    sizes = ["stages.long.seq_len=8192", "stages.long.tokens=32768", "stages.long.global_batch=1"]
    assert main(["plan", *RECIPE, "~stages.short", "~stages.full", *sizes, *sparing]) == 0
    assert "faster, at" in capsys.readouterr().out


def test_more_gpus_share_a_sequence() -> None:
    config = long_stage(4 * 1_048_576, "launch.nproc=8", "mesh.sequence_parallel=8")
    found = suggest(config, "long", gpu_named("h200"), Rates())
    assert found is not None and found[1].job.parallel == 8


def test_command_prints_parts_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=quickstart", "launch.nproc=2", "gpu=h100"]) == 0
    text = capsys.readouterr().out
    words = ("2 x h100", "weights", "optimizer", "activations", "tokens/s", "MFU", "host memory", "fits")
    assert all(word in text for word in words), text
    sizes = ["stages.long.seq_len=1048576", "stages.long.tokens=4194304", "stages.long.global_batch=1"]
    assert main(["plan", *RECIPE, *sizes]) == 1
    assert "would fit" in capsys.readouterr().out
    assert main(["plan", "recipe=quickstart", "gpu=b300"]) == 2


def test_rates_come_from_measured_files(tmp_path: Path) -> None:
    h200 = gpu_named("h200")
    assert measured_rates(h200, tmp_path).sources == ("typical values for the rest",)
    row = {"seq_len": 8192, "num_heads": 32, "head_dim": 128, "block_size": 512, "topk": 3}
    row |= {"fwd_ms": 1.0, "fwd_bwd_ms": 3.0, "dense_fwd_ms": None, "dense_fwd_bwd_ms": None}
    report = {"gpu": "NVIDIA H200", "rows": [row]}
    (tmp_path / "attention-x.json").write_text(json.dumps(report))
    rates = measured_rates(h200, tmp_path)
    assert "attention-x.json" in rates.sources and len(rates.attention) == 1
    assert rates.attention[0].forward == pytest.approx(rates.attention[0].backward)  # 2x the work in 2x the time
    assert not measured_rates(gpu_named("h100"), tmp_path).attention  # another GPU's numbers are no guide


def test_recipe_that_starts_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256}
    shape |= {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    shape |= {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    shape |= {"rope_theta": 500_000.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "tokenizer.json").write_text("{}")
    code = main(["plan", "recipe=llama8b_1m_moba", f"init.hf={tmp_path}", "launch.nproc=8"])
    text = capsys.readouterr()
    assert code in (0, 1) and not text.err, text.err
    assert "1,048,576 tokens" in text.out


def test_device_names() -> None:
    assert gpu_of_device("NVIDIA H200") == gpu_named("h200")
    assert gpu_of_device("NVIDIA H100 80GB HBM3") == gpu_named("h100")
    assert gpu_of_device("NVIDIA A100-SXM4-80GB") == gpu_named("a100")
    assert gpu_of_device("cpu") is None


def test_recorded_predictions_of_time_are_close_after_calibration() -> None:
    """The planner with the repository's own measurements, against the steps they came from."""
    from launch.plan_rates import RESULTS, job_of_row
    from model.memory import step_memory
    from model.schedule import FULL, LayerPlan
    from model.step_time import step_time

    gpu = gpu_named("h200")
    rates = measured_rates(gpu)
    rows = json.loads((RESULTS / "step-h200.json").read_text())["rows"]
    measured = [row for row in rows if "error" not in row and row["processes"] == 1]
    assert len(measured) >= 6
    for row in measured:
        words = row["plan"].split()
        plan = FULL if words == ["full"] else LayerPlan("moba", *map(int, words[1].split("x")))
        job = job_of_row(row, (plan,) * row["model"]["num_layers"])
        memory = step_memory(job)
        assert abs(memory.peak / row["peak_bytes"] - 1) < 0.10, row["case"]
        speed = row["seq_len"] / step_time(job, gpu, rates, memory).total
        assert abs(speed / row["tokens_per_s"] - 1) < 0.15, row["case"]


def test_bench_step_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    old = {"case": "8/full", "device": "gone", "processes": 1, "model": {}, "engine": {}, "mesh": {}, "seq_len": 8}
    out.write_text(json.dumps({"rows": [old | {"error": "kept", "plan": "full", "fits": True}]}))
    command = ["bench", "step", "model=tiny", "sweep=[64/full,64/32x2]", "steps=1", f"out={out}"]
    assert main(command) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["64/full", "64/32x2", "8/full"] or len(rows) == 3
    mine = [row for row in rows if row["device"] == "cpu"]
    assert all(row["predicted_bytes"] > 0 and row["tokens_per_s"] > 0 for row in mine)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "one optimizer step on 1 x cpu" in capsys.readouterr().out


def test_same_configuration_replaces_its_row(tmp_path: Path) -> None:
    row = {"case": "8/full", "device": "x", "processes": 1, "model": {}, "engine": {}, "mesh": {}, "seq_len": 8}
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rows": [row | {"value": 1}]}))
    assert merged(path, [row | {"value": 2}]) == {"rows": [row | {"value": 2}]}


def test_table_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.command import console

    engine = {"zero_stage": 1, "checkpointing": "full", "offload_checkpoints": True, "mlp_tile": 0}
    engine |= {"offload_optimizer": False, "offload_param": False, "fused": "none"}
    row = {"seq_len": 8, "plan": "full", "engine": engine, "mesh": {"sequence_parallel": 1}, "processes": 1}
    print_table(
        [row | {"device": "x", "predicted_bytes": GIB, "error": "out of memory: x", "fits": False}], console()
    )
    assert "not" in capsys.readouterr().out
