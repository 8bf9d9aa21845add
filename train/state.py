"""Full fp32 master weights and AdamW moments in and out of an engine, one parameter at a time.

What lies in a checkpoint knows nothing of world size or ZeRO stage; this file is the only one that knows where
DeepSpeed keeps things. Every function here is collective unless it says otherwise: all ranks call it, in the
same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from model.weights import check_names, load_weights
from train.engine import DeepSpeedEngine

WEIGHT = ""  # key of the master weight itself beside AdamW's two moments
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """Where a run stands: everything a resume needs beside tensors. Plain JSON."""

    stage: str
    step: int = 0  # optimizer steps over the whole chain
    tokens: int = 0  # tokens over the whole chain, masked ones included
    stage_step: int = 0
    stage_tokens: int = 0
    stage_done: bool = False
    optimizer_step: int = 0  # AdamW's own count: bias correction depends on it
    loader: dict[str, Any] = field(default_factory=dict)
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of steps, for `train.guard`

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> TrainState:
        try:
            return cls(**raw)
        except TypeError as error:
            raise UserError(f"{where}: not a state this version can resume from ({error})") from error


def named_parameters(engine: DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    """Names as in the model, tied parameters once. Local."""
    return list(engine.module.named_parameters())


def full_shape(param: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO-3 has cut it to pieces. Local."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def _inner(engine: DeepSpeedEngine) -> torch.optim.AdamW:
    """The AdamW we built; ZeRO wraps it, stage 0 does not."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert isinstance(inner, torch.optim.AdamW), type(inner)
    return inner


def _masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The fp32 tensors AdamW steps on: this rank's flat partitions, or the parameters themselves in stage 0."""
    if engine.zero_optimization_stage() == 3:  # param_groups are filled only during a step there
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [param for group in _inner(engine).param_groups for param in group["params"]]


def reset_optimizer(engine: DeepSpeedEngine, step: int) -> None:
    """Give AdamW zero moments and the step count `step`, before the first step as well as after. Local.

    DeepSpeed leaves the states to the first step, or (bf16 with fp32 accumulation in stage 1) makes them by a
    hidden step on zero gradients; a resume needs them to exist, and the count to be exact.
    """
    inner = _inner(engine)
    fused = bool(inner.defaults["fused"])
    for master in _masters(engine):
        state = inner.state[master]
        count = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
        state["step"] = count.fill_(step)
        for key in MOMENTS:
            made = state.get(key)  # by DeepSpeed: zeroed where it lies, for there may be no room for it twice
            state[key] = torch.zeros_like(master) if made is None else made.zero_()
    if engine.zero_optimization_stage() in (1, 2):
        # Tell DeepSpeed's per-parameter views about the new tensors.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_step(engine: DeepSpeedEngine) -> int:
    """AdamW's step count; 0 before the first step. Local."""
    counts = {int(state["step"]) for state in _inner(engine).state.values() if "step" in state}
    assert len(counts) <= 1, f"AdamW's groups disagree on the step count: {counts}"
    return counts.pop() if counts else 0


def get_full(engine: DeepSpeedEngine, param: nn.Parameter, key: str) -> Tensor:
    """The whole fp32 master weight (`key` WEIGHT) or moment of `param`, on the device, on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return param.detach() if key == WEIGHT else _inner(engine).state[param][key]
    full = safe_get_full_optimizer_state(param, key) if key else safe_get_full_fp32_param(param)
    assert full is not None, f"DeepSpeed holds no {key or 'master weight'} for a parameter of {full_shape(param)}"
    return full.reshape(full_shape(param))


def _mapping(param: nn.Parameter) -> Any:
    """Where DeepSpeed's stages 1 and 2 keep the fp32 values of `param`; None: not on this rank."""
    return getattr(param, "_hp_mapping", None)


def lies_whole(engine: DeepSpeedEngine, param: nn.Parameter) -> bool:
    """Whether this rank's partition has all of `param` and no other rank's any, as ZeRO 1 and 2 cut. Local."""
    mapping = _mapping(param)
    return (
        engine.zero_optimization_stage() in (1, 2)
        and mapping is not None
        and int(mapping.lp_fragment_address.numel) == param.numel()
    )


def get_own(engine: DeepSpeedEngine, param: nn.Parameter, key: str) -> Tensor:
    """As `get_full`, where `lies_whole`: the optimizer's own tensor, which the next step changes. Local."""
    fragment: Tensor = _mapping(param).get_hp_fragment(key or None)
    return fragment.detach().reshape(param.shape)


def put_full(engine: DeepSpeedEngine, param: nn.Parameter, key: str, value: Tensor) -> None:
    """Overwrite what `get_full` reads. The model's own (bf16) copy is not touched: see `put_weights`. Local."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(dtype=torch.float32)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        target = param.data if key == WEIGHT else _inner(engine).state[param][key]
        target.copy_(value)
    elif stage == 3:
        # safe_set_full_* cannot cut a parameter whose size is no multiple of the world: it knows no padding.
        mine = _own_part(param, value)
        if key == WEIGHT:
            safe_set_local_fp32_param(param, mine)
        else:
            safe_set_local_optimizer_state(param, mine, key)
    elif key == WEIGHT:
        safe_set_full_fp32_param(param, value)
    else:
        safe_set_full_optimizer_state(param, value, key)


def _own_part(param: Any, value: Tensor) -> Tensor:
    """The piece of `value` that this rank holds of `param` under ZeRO-3, zeros behind its end. Local."""
    part = param.ds_tensor.numel()
    rank = torch.distributed.get_rank(group=param.ds_process_group)
    mine = value.flatten()[rank * part : (rank + 1) * part]
    return torch.nn.functional.pad(mine, (0, part - mine.numel()))


@torch.no_grad()
def fill_model(model: nn.Module, weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Give a model that has no engine yet its weights, tensor by tensor. Local.

    Where ZeRO-3 has cut the parameters (see `train.engine.build_model`), each rank keeps its own pieces.

    Raises:
        UserError: missing, extra or misshapen tensors.
    """
    params = dict(model.named_parameters())
    if not any(hasattr(param, "ds_tensor") for param in params.values()):
        load_weights(model, weights, where)
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in weights:
        shapes[name] = tuple(value.shape)
        if name in params and full_shape(params[name]) == value.shape:
            cut: Any = params[name]
            cut.ds_tensor.copy_(_own_part(cut, value))
    check_names(shapes, {name: tuple(full_shape(param)) for name, param in params.items()}, where)


def put_weights(engine: DeepSpeedEngine, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Overwrite the fp32 master weights with full tensors by name; every parameter must come once. Local.

    `build_engine` was given the same values, so that the model's rounded copy of them agrees already.
    """
    params = dict(named_parameters(engine))
    for name, value in weights:
        put_full(engine, params.pop(name), WEIGHT, value)
    if params:
        raise UserError(f"no weights for {sorted(params)[0]} and {len(params) - 1} other parameters")
