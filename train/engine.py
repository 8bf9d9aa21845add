"""Typed configuration -> DeepSpeed. One code path for CPU (gloo) and GPU (NCCL).

DeepSpeed sees `world` plain data-parallel ranks and averages gradients over them; `train.loop` puts the token
normalisation into the loss scale, so every ZeRO stage computes the gradient of the same global mean.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from datetime import timedelta
from typing import Any, TypeAlias

import torch
from torch import nn

from conf.errors import UserError
from conf.schema import OptimConfig, RopeConfig, TrainConfig
from model.execution import PLAIN, Execution
from model.layers import MLP
from model.rope import Rotary
from model.shapes import head_dim, num_parameters
from model.transformer import CausalLM
from train.bf16 import make_lean
from train.mesh import Mesh, build_mesh
from train.optim import build_adamw

DeepSpeedEngine: TypeAlias = Any  # deepspeed.DeepSpeedEngine: imported where it is used, and untyped


def init_distributed(sequence_parallel: int, timeout: float = 0.0) -> Mesh:
    """Join the process group torchrun describes in the environment; groups and device of this rank.

    `timeout`: of the watchdog, in seconds; collectives wait a little longer, so that it can speak first. 0: a day.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints a warning about its guess
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Otherwise the first start on any machine compiles C++ for about 80 s, for an operator we never use,
        # and fails where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        index = int(os.environ.get("LOCAL_RANK", "0"))
        accelerator.set_device(index)
        device = torch.device(accelerator.device_name(index))
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name() if device.type != "cpu" else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=1.5 * timeout + 60 if timeout else 86_400),
        verbose=False,
    )
    return build_mesh(sequence_parallel, device)


def micro_batches_per_step(global_batch: int, micro_batch: int, dp_world: int) -> int:
    """Micro-batches each rank accumulates per optimizer step."""
    count, rest = divmod(global_batch, micro_batch * dp_world)
    if rest or not count:
        rows = f"micro_batch={micro_batch} x {dp_world} data-parallel ranks"
        raise UserError(f"global_batch={global_batch} is no multiple of {rows}: use a multiple of both")
    return count


def deepspeed_config(config: TrainConfig, micro_batch: int, accumulation: int, numel: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; `numel` is the model's parameter count."""
    stage, precision = config.engine.zero_stage, config.engine.precision
    if precision == "bf16" and stage == 0:
        # DeepSpeed would pick another optimizer, which takes a hidden step on zero gradients at the start.
        raise ValueError("engine.precision=bf16 needs engine.zero_stage 1, 2 or 3 (1 does no harm on one rank)")
    ds: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip if stage else 0.0,  # stage 0: `clip_and_norm`, which also reports
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Its stopwatch, on by default, waits for the device at both ends of every step.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,  # ours is torch's AdamW, with a veto on bad steps
        "zero_optimization": {
            "stage": stage,
            # The bucket holds at most the model: the default would reserve gigabytes for a small one.
            "reduce_bucket_size": min(500_000_000, numel),
        },
    }
    zero = ds["zero_optimization"]
    pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = pinned
        ds["zero_force_ds_cpu_optimizer"] = False  # PyTorch's fused AdamW; DeepSpeed's compiles C++ at start
    if config.engine.offload_param:
        zero["offload_param"] = pinned
    if precision == "bf16":
        # Non-finite gradients are caught from the logged norm, not by a device synchronisation in every step.
        ds["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # Micro-batches add up in fp32. bf16 sums lose a gradient that is 1/256 of what is already there.
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
        if stage == 1:  # and each bf16 gradient goes as soon as it is there: see `train.bf16`
            ds["bf16"]["immediate_grad_update"] = True
    elif precision != "fp32":
        raise ValueError(f"engine.precision={precision!r} is neither fp32 nor bf16")
    return ds


def build_model(
    config: TrainConfig, name: str, rope: RopeConfig, accumulation: int, execution: Execution = PLAIN
) -> CausalLM:
    """The model of stage `name`, its weights still to be filled in (`train.state.fill_model`).

    Under ZeRO-3 every parameter is cut to pieces as soon as it is made: no rank ever holds more than one whole.
    """
    stage = config.stages[name]
    if config.engine.zero_stage < 3:
        with torch.device("meta"):  # else torch draws weights that nobody asked for: seconds per billion
            model = CausalLM(config.model, rope, stage.attention.backend, execution)
        return model.to_empty(device="cpu")
    import deepspeed

    ds = deepspeed_config(config, stage.micro_batch, accumulation, num_parameters(config.model))
    with deepspeed.zero.Init(config_dict_or_path=ds):
        model = CausalLM(config.model, rope, stage.attention.backend, execution)
    # In there every new floating-point tensor is rounded to the dtype of the parameters, RoPE's frequencies too.
    model.model.rotary = Rotary(rope, head_dim(config.model))
    return model


def build_engine(
    model: nn.Module, config: TrainConfig, micro_batch: int, accumulation: int, mesh: Mesh
) -> DeepSpeedEngine:
    """Wrap `model` (fp32 weights on the CPU, equal on all ranks, or cut by `build_model`) with ZeRO and AdamW.

    The weights become the master weights bit for bit; in bf16 the caller restores them with
    `train.state.put_weights`, since DeepSpeed rounds before it copies.
    """
    import deepspeed

    if config.engine.zero_stage == 3 and config.engine.mlp_tile:
        # An MLP gathers its weights as a whole, once: ranks may then work on different numbers of tiles.
        deepspeed.utils.set_z3_leaf_modules(model, [MLP])
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    on_gpu = mesh.device.type == "cuda"
    # One of its optimizers prints memory tables unasked; and it warns of a subclass of an AdamW that it knows.
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_adamw(model, config.optim, fused=on_gpu or config.engine.offload_optimizer),
            config=deepspeed_config(config, micro_batch, accumulation, numel),
            dist_init_required=False,
        )
    make_lean(engine)
    return engine


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()


def set_lr(engine: DeepSpeedEngine, lr: float) -> None:
    """Learning rate of the next optimizer step, in every group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def clip_and_norm(engine: DeepSpeedEngine, config: OptimConfig) -> torch.Tensor | None:
    """ZeRO stage 0 only, between the last backward and the step: clip, and return the norm before clipping.

    The other stages clip inside DeepSpeed's step; for them this returns None and `grad_norm` has the value.
    """
    if engine.zero_optimization_stage() > 0:
        return None
    limit = config.clip or float("inf")
    return torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit)


def grad_norm(engine: DeepSpeedEngine, own: torch.Tensor | None) -> torch.Tensor:
    """Global gradient norm before clipping, fp32 scalar on the device; `own` is `clip_and_norm`'s answer."""
    norm = engine.get_global_grad_norm() if own is None else own
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device).reshape(())
