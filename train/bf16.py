"""DeepSpeed's BF16_Optimizer (ZeRO-1 in bf16) without the passes over all gradients that a step can do without.

As it comes it reads and writes 96 bytes of device memory per parameter and step where 38 do: it casts each
gradient to fp32 before it adds it to a buffer of zeros, clears that buffer twice, clips in a pass of its own,
rounds the new weights in another, and on a single rank rounds the sums to bf16 for a reduction that has nobody to
reduce with. It also waits for the device in every step, to look at the norm. Here the weight gradients of
projections go into the fp32 buffer from within their products (`model.products`), and on a GPU AdamW is one pass
over everything (`train.triton_adamw`). What it holds and computes stays the same, but that fewer sums are rounded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.embedding import Embedding
from model.loss import LMHead
from model.products import Joint, Linear, place_gradient
from train.optim import GuardedAdamW

if TYPE_CHECKING:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer as _Base
else:
    _Base = object  # DeepSpeed is imported when an engine is built: see `_lean_class`


def make_lean(engine: Any) -> None:
    """Change a fresh engine's optimizer, if it is a BF16_Optimizer, in place."""
    optimizer, lean = engine.optimizer, _lean_class()
    if type(optimizer) is not lean.__bases__[-1]:
        return
    assert optimizer.immediate_grad_update and isinstance(optimizer.optimizer, GuardedAdamW)
    optimizer.__class__ = lean
    optimizer.move_clipping()
    _sum_in_products(engine.module, optimizer)
    if torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False


class GradientShare:
    """The part of the optimizer's fp32 gradients that belongs to some parameters, which lie side by side."""

    def __init__(self, optimizer: Any, places: Sequence[tuple[int, int]], total: Tensor) -> None:
        self._optimizer, self._places, self.total = optimizer, places, total

    def begin(self) -> bool:
        """As `model.products.GradientSum` has it."""
        present = self._optimizer.fp32_groups_has_gradients
        known = [present[group][index] for group, index in self._places]
        for (group, index), there in zip(self._places, known, strict=True):
            if any(known) and not there:
                self._optimizer.fp32_groups_gradients[group][index].zero_()
            present[group][index] = True
        return not any(known)


def _sum_in_products(model: nn.Module, optimizer: Any) -> None:
    """Give projections the place of their gradients, and joint ones the place of their weights.

    Embedding and head have one on a GPU only: elsewhere nothing is gained, and their sums stay PyTorch's own.
    """
    kinds = (Linear, Embedding, LMHead) if optimizer.fp32_groups_flat_partition[0].is_cuda else (Linear,)
    places, totals = {}, {}
    for group, params in enumerate(optimizer.bf16_groups):
        for index, param in enumerate(params):
            places[param] = (group, index)
            totals[param] = optimizer.fp32_groups_gradients[group][index].view(param.shape)
    for module in model.modules():
        if isinstance(module, kinds) and module.weight in places:
            weight = module.weight
            place_gradient(weight, GradientShare(optimizer, [places[weight]], totals[weight]))
        if isinstance(module, Joint) and all(weight in places for weight in module.weights):
            joined = [_as_one(module.weights), _as_one([totals[weight] for weight in module.weights])]
            if joined[0] is not None and joined[1] is not None:
                shares = GradientShare(optimizer, [places[weight] for weight in module.weights], joined[1])
                module.join(joined[0], shares)


def _as_one(matrices: Sequence[Tensor]) -> Tensor | None:
    """Matrices of equal width as one, if they follow each other in memory."""
    first, end = matrices[0], matrices[0].data_ptr()
    for matrix in matrices:
        if matrix.data_ptr() != end or not matrix.is_contiguous() or matrix.shape[1] != first.shape[1]:
            return None
        end += matrix.numel() * matrix.element_size()
    rows = sum(matrix.shape[0] for matrix in matrices)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


class Lean(_Base):
    """The first gradient of a step overwrites what the last step left in the fp32 buffer."""

    def move_clipping(self) -> None:
        """AdamW scales the gradients as it reads them, and leaves out an update that is not finite."""
        on_gpu = self.fp32_groups_flat_partition[0].is_cuda
        self.one_pass = on_gpu and importlib.util.find_spec("triton") is not None
        limit = self.clip_grad
        if limit > 0.0:
            self.optimizer.shrink = lambda: _shrink(self._global_grad_norm, limit)
        self.optimizer.veto = lambda: ~self._global_grad_norm.isfinite()

    def destroy(self) -> None:
        """Also lets go of the gradients' places: through them a parameter would keep all of this alive."""
        for param in (param for group in self.bf16_groups for param in group):
            vars(param).pop("gradient_sum", None)
        super().destroy()

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
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.fp32_groups_gradients_flat]
        self._global_grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.one_pass:
            self._step_in_one_pass()
        else:
            for master, gradient in zip(
                self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True
            ):
                master.grad = gradient
            self.optimizer.step()
            self._lazy_init_hp_params_optimizer_state()
            self.update_lp_params()
        self.clear_hp_grads()

    def _step_in_one_pass(self) -> None:
        """As the other way, but that AdamW writes the rounded weights as it goes."""
        from train.triton_adamw import adamw

        sound = torch.where(self.optimizer.veto(), torch.nan, self._global_grad_norm)
        for index, group in enumerate(self.optimizer.param_groups):
            master = self.fp32_groups_flat_partition[index]
            state = self.optimizer.state[master]
            if not state:  # as PyTorch's first step has it
                zeros = torch.zeros_like(master), torch.zeros_like(master)
                state.update(step=torch.zeros((), device=master.device), exp_avg=zeros[0], exp_avg_sq=zeros[1])
            rank = torch.distributed.get_rank(group=self.real_dp_process_group[index])
            adamw(
                master, self.fp32_groups_gradient_flat_partition[index], state["exp_avg"], state["exp_avg_sq"],
                self.bf16_partitioned_groups[index][rank], state["step"], sound, limit=self.clip_grad,
                **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
            )  # fmt: skip
        self._lazy_init_hp_params_optimizer_state()
        self.gather_weights()

    def gather_weights(self) -> None:
        """Every rank's share of the rounded weights to all."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        if torch.distributed.get_world_size() > 1:
            all_gather_dp_groups(
                groups_flat=self.bf16_groups_flat,
                partitioned_param_groups=self.bf16_partitioned_groups,
                dp_process_group=self.real_dp_process_group,
                start_alignment_factor=self.nccl_start_alignment_factor,
                allgather_bucket_size=self.allgather_bucket_size,
            )

    def _clear_missing(self) -> None:
        """A parameter that had no part in this step has no gradient, not that of an earlier step."""
        for gradients, present in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for gradient, there in zip(gradients, present, strict=True):
                if not there:
                    gradient.zero_()


@cache
def _lean_class() -> Any:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return type("LeanBF16", (Lean, BF16_Optimizer), {})


def _shrink(norm: Tensor, limit: float) -> Tensor:
    """Factor of the gradients, at most 1, as DeepSpeed's clipping has it."""
    return (limit / (norm.float() + 1e-6)).clamp(max=1.0)
