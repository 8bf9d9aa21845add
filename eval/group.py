"""Evaluation on several processes: the first one runs the suites and writes, the others compute along.

Every process holds the whole weights; a prompt or a row of tokens is shared out over all of them (sequence
parallelism, `model.parallel_generation`). `Group` is what the first process asks instead of its model. It tells
the others what to do, and all do it together; `serve` is what they run meanwhile.

Shape legend: R rows, S seq_len, P processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from eval.generate import generate
from eval.loss import whole_row_losses
from eval.prefixes import Prefixes
from model.execution import Execution
from model.schedule import LayerPlan
from model.sequence_parallel import SequenceParallel
from model.transformer import CausalLM


class Group:
    """The first process's way to `model`, whose work is shared out."""

    def __init__(self, model: CausalLM) -> None:
        assert model.execution.parallel is not None
        self.model, self._parallel, self.prefixes = model, model.execution.parallel, Prefixes()

    def generate(self, prompts: Sequence[Sequence[int]], ended: Any = None, **settings: Any) -> list[list[int]]:
        """`eval.generate.generate` without its model. `ended` is asked here only."""
        _tell(self._parallel, ("generate", (prompts, settings)))
        return generate(self.model, prompts, ended=ended, prefixes=self.prefixes, **settings)

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: Sequence[LayerPlan],
    ) -> Tensor:
        """As `CausalLM.token_losses` of whole rows, fp32 [R, S].

        Raises:
            UserError: S is not a multiple of the number of processes.
        """
        if input_ids.shape[1] % self._parallel.size:
            raise UserError(
                f"rows of {input_ids.shape[1]} tokens cannot be shared out: choose loss.seq_len as a multiple of "
                f"sequence_parallel={self._parallel.size}"
            )
        tensors = [x.cpu() for x in (input_ids, labels, positions, cu_seqlens)]
        _tell(self._parallel, ("token_losses", (*tensors, max_seqlen, plans)))
        return whole_row_losses(self.model, input_ids, labels, positions, cu_seqlens, max_seqlen, plans)

    def stop(self) -> None:
        """The others leave `serve`."""
        _tell(self._parallel, ("stop", ()))


def serve(model: CausalLM) -> None:
    """Do what the group's first process says, until it stops."""
    parallel = model.execution.parallel
    assert parallel is not None
    device, prefixes = next(model.parameters()).device, Prefixes()
    while True:
        what, values = _tell(parallel, None)
        if what == "stop":
            return
        if what == "generate":
            prompts, settings = values
            generate(model, prompts, prefixes=prefixes, **settings)
        else:
            tensors, rest = [x.to(device) for x in values[:4]], values[4:]
            whole_row_losses(model, *tensors, *rest)


def group_execution() -> Execution:
    """All processes of the world as one sequence-parallel group."""
    assert dist.group.WORLD is not None
    return Execution(parallel=SequenceParallel(dist.group.WORLD))


def _tell(parallel: SequenceParallel, message: tuple[str, Any] | None) -> tuple[str, Any]:
    """The first process's message, on all."""
    box = [message]
    dist.broadcast_object_list(box, src=dist.get_global_rank(parallel.group, 0), group=parallel.group)
    assert box[0] is not None
    return box[0]
