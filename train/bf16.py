"""DeepSpeed's BF16_Optimizer (ZeRO-1 in bf16) without the passes over all gradients that a step can do without.

As it comes it reads and writes 96 bytes of device memory per parameter and step where 48 do: it casts each
gradient to fp32 before it adds it to a buffer of zeros, clears that buffer twice, clips in a pass of its own, and
on a single rank rounds the sums to bf16 for a reduction that has nobody to reduce with. It also waits for the
device in every step, to look at the norm. What it holds and what it computes stay the same, but that a lone rank's
gradients are no longer rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from train.optim import GuardedAdamW


def make_lean(engine: Any) -> None:
    """Change a fresh engine's optimizer, if it is a BF16_Optimizer, in place."""
    optimizer, lean = engine.optimizer, _lean_class()
    if type(optimizer) is not lean.__base__:
        return
    assert optimizer.immediate_grad_update and isinstance(optimizer.optimizer, GuardedAdamW)
    optimizer.__class__ = lean
    optimizer.move_clipping()
    if torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False


@cache
def _lean_class() -> Any:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    class LeanBF16(BF16_Optimizer):
        """The first gradient of a step overwrites what the last step left in the fp32 buffer."""

        def move_clipping(self) -> None:
            """AdamW scales the gradients as it reads them, and leaves out an update that is not finite."""
            limit = self.clip_grad
            if limit > 0.0:
                self.optimizer.shrink = lambda: _shrink(self._global_grad_norm, limit)
            self.optimizer.veto = lambda: ~self._global_grad_norm.isfinite()

        @torch.no_grad()
        def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
            if lp.grad is None:
                return
            total = self.fp32_groups_gradients[group_idx][param_idx]
            if self.fp32_groups_has_gradients[group_idx][param_idx]:
                total.add_(lp.grad.view_as(total))
            else:  # torch's copy between dtypes reaches half the bandwidth of this
                torch._foreach_copy_([total], [lp.grad.view_as(total)])
            lp._hp_grad = total
            self.fp32_groups_has_gradients[group_idx][param_idx] = True

        def clear_hp_grads(self) -> None:
            """Only forgets what the buffers hold."""
            self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]

        def get_grads_for_reduction(self) -> Any:
            self._clear_missing()
            return super().get_grads_for_reduction()

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """The base's, but that the device is never waited for: AdamW's veto leaves out what is not finite."""
            self._clear_missing()
            gradients, _ = self.get_grads_for_norm()
            self._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
            for master, gradient in zip(
                self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True
            ):
                master.grad = gradient
            self.optimizer.step()
            self._lazy_init_hp_params_optimizer_state()
            self.update_lp_params()
            self.clear_hp_grads()

        def _clear_missing(self) -> None:
            """A parameter that had no part in this step has no gradient, not that of an earlier step."""
            for gradients, present in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
                for gradient, there in zip(gradients, present, strict=True):
                    if not there:
                        gradient.zero_()

    return LeanBF16


def _shrink(norm: Tensor, limit: float) -> Tensor:
    """Factor of the gradients, at most 1, as DeepSpeed's clipping has it."""
    return (limit / (norm.float() + 1e-6)).clamp(max=1.0)
