"""What the gloo workers of test_origin.py and test_switch.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conf.schema import AttentionConfig, TrainConfig
from tests.train import jobs


def config_from(folder: str, zero_stage: int, precision: str = "fp32", key_conv: int = 0) -> TrainConfig:
    """The tiny configuration with the model and RoPE of a Hugging Face folder, as the launcher fills them in."""
    from conf.schema import StageRopeConfig
    from model.hf_config import read_config_json

    config = jobs.tiny_config(zero_stage, precision)
    parsed = read_config_json(Path(folder))
    config.model, config.init.hf = parsed.model, folder
    config.model.key_conv = key_conv
    config.stages["one"].rope = StageRopeConfig(**vars(parsed.rope))
    config.stages["one"].attention = AttentionConfig(kind="moba", block_size=16, topk=2, backend="reference")
    return config


def first_loss(
    folder: str, zero_stage: int, precision: str, key_conv: int = 0, checkpoint: str = ""
) -> dict[str, Any]:
    """Loss of the first global batch and of the second, after one step; master weights at the start."""
    from train.loop import fit

    config = config_from(folder, zero_stage, precision, key_conv)
    if checkpoint:  # an import of the same folder
        config.init.hf, config.init.checkpoint = "", checkpoint
    config.max_steps = 2
    run = jobs.make_run(config)
    masters = {name[1:]: tensor.numpy() for name, tensor in jobs.tensors_of(run.engine).items() if name[0] == ":"}
    fit(run)
    return {"loss": [row["loss"] for row in run.rows], "masters": masters}


def memory_of_init(folder: str) -> dict[str, int]:
    """Bytes: the whole model in fp32, the most this rank's memory grew while building it, what it holds then."""
    from train.engine import build_engine, build_model, init_distributed
    from train.origin import open_origin
    from train.state import fill_model

    mesh = init_distributed(1)
    config = config_from(folder, 3)
    rope = config.stages["one"].rope
    base = _restart_peak()
    model = build_model(config, "one", rope, 1)
    origin = open_origin(config, None, mesh)
    fill_model(model, origin.weights, origin.name)
    peak = _status("VmHWM") - base
    params: list[Any] = list(model.parameters())
    whole = sum(4 * param.ds_numel for param in params)
    held = sum(4 * (param.numel() + param.ds_tensor.numel()) for param in params if param.data_ptr())
    held += sum(4 * param.ds_tensor.numel() for param in params if not param.data_ptr())
    engine = build_engine(model, config, 1, 1, mesh)
    masters = sum(4 * flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat)
    return {"whole": whole, "peak": peak, "held": held, "masters": masters}


def _restart_peak() -> int:
    """Forget the peak of this process's memory; returns what it holds now, in bytes. Linux."""
    import gc

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def switch(folder: str, before: AttentionConfig, after: AttentionConfig) -> dict[str, Any]:
    """Train three steps with one plan, save, load with another; losses and tensors on both sides."""
    from train.loop import current_plans, fit

    config = jobs.tiny_config()
    config.max_steps = 3
    config.stages["one"].attention = before
    run = jobs.make_run(config, save=folder)
    fit(run)
    one, step = jobs.tensors_of(run.engine), run.state.step
    old = _loss(run, current_plans(run))
    config = jobs.tiny_config()
    config.stages["one"].attention = after
    again = jobs.make_run(config, load=str(Path(folder) / f"step-{step:08d}"))
    loaded = jobs.tensors_of(again.engine)
    new = _loss(again, current_plans(again))
    untouched = jobs.tensors_of(again.engine)
    fit(again)
    return {
        "saved_is_loaded": all(torch.equal(one[name], loaded[name]) for name in one | loaded),
        "switch_changed_nothing": all(torch.equal(one[name], untouched[name]) for name in one),
        "moments_are_there": any(tensor.any() for name, tensor in loaded.items() if name.startswith("exp_avg:")),
        "loss": (old, new),
        "loss_in_old_plan": _loss(run, current_plans(run)),
        "goes_on": [row["loss"] for row in again.rows],
    }


def _loss(run: Any, plans: Any) -> float:
    batch = jobs.global_batch(9)
    with torch.no_grad():
        out = run.engine.module(
            batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens, batch.max_seqlen, plans
        )
    return float(out.loss_sum) / int(out.num_valid)
