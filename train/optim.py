"""AdamW's parameter groups, and the learning rate as a pure function of tokens seen in the stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import LrConfig, OptimConfig


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves out the updates `veto` objects to: weights, moments and step count stay as they are.

    The fused one decides on the device, by the flag meant for gradient scalers, and scales gradients as it reads
    them; the others run on the CPU, where looking costs nothing.
    """

    veto: Callable[[], Tensor] | None = None  # bool [], asked once the gradients are final
    shrink: Callable[[], Tensor] | None = None  # fp32 [], factor of all gradients, asked then too

    def step(self, closure: Any = None) -> Any:
        if self.shrink is not None:
            self._scale(self.shrink())
        if self.veto is None:
            return super().step(closure)
        bad = self.veto()
        if self.defaults["fused"]:
            self.found_inf = bad.float().reshape(())
            return super().step(closure)
        return None if bool(bad) else super().step(closure)

    def _scale(self, factor: Tensor) -> None:
        if self.defaults["fused"]:
            self.grad_scale = factor.reciprocal()
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(factor)


def decays(name: str, param: nn.Parameter) -> bool:
    """Weight decay applies to matrices: not to norm gains, biases or convolution kernels."""
    # Under ZeRO-3's own construction a parameter is already cut to pieces; its true shape is `ds_shape`.
    ndim = len(getattr(param, "ds_shape", param.shape))
    return ndim == 2 and not name.endswith("bias") and "norm" not in name.rsplit(".", 2)[-2]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not; an empty one is left out (DeepSpeed cannot flatten it)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, param in named:
        if param.requires_grad:
            groups[decays(name, param)].append(param)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0}
        for decayed, params in groups.items()
        if params
    ]


def build_adamw(model: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """PyTorch's own AdamW (DeepSpeed's would compile C++ at start). The rate is set before every step.

    `fused`: one kernel for all parameters, on a GPU; on the CPU one vectorised pass over each.
    """
    return GuardedAdamW(
        parameter_groups(model.named_parameters(), config.weight_decay),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


def lr_at(config: LrConfig, tokens: int, total: int) -> float:
    """Learning rate of the step that brings the stage to `tokens` of `total`.

    Counting the step's own tokens means that the first step is not wasted on rate 0, and that the last one runs
    exactly at `peak * min_ratio`.
    """
    fraction = min(tokens / total, 1.0)
    if fraction < config.warmup:
        return config.peak * fraction / config.warmup
    if config.schedule == "constant":
        return config.peak
    progress = (fraction - config.warmup) / (1.0 - config.warmup) if config.warmup < 1.0 else 0.0
    if config.schedule == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        shape = 1.0 - progress
    else:
        raise ValueError(f"lr.schedule={config.schedule!r} is none of cosine, linear, constant")
    return config.peak * (config.min_ratio + (1.0 - config.min_ratio) * shape)
