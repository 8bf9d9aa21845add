"""Memory of a training step, from shapes alone: the step is played through, tensor by tensor, for its peak.

Every tensor that grows with the tokens is taken from and given back to a ledger in the order in which the code
allocates it, and so is what the engine holds: `model.memory_layers` plays a block, `model.memory_states` weights,
gradients and optimizer. Sizes are those of the operators in use; what the allocator loses between tensors and what
the driver takes is not in here.

Names: t tokens of this rank, T tokens of whole rows, C hidden_size, F intermediate_size, A = heads * head_dim,
K = kv heads * head_dim, V vocab_size, b bytes of an activation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from conf.schema import EngineConfig, ModelConfig
from model.schedule import LayerPlan
from model.shapes import head_dim

# Of a step, as the planner prints them. `attention` is workspace of the kernels; what they keep is in
# `checkpoints` with activation checkpointing, else in `activations`.
PARTS = (
    "weights", "gradients", "optimizer", "checkpoints", "activations", "attention", "loss", "communication",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One optimizer step of one rank.

    Attributes:
        plans: one per layer.
        rows: sequences of a micro-batch. seq_len: tokens of a row.
        world: processes; `parallel` of them share each sequence.
        cuda: kernels of a GPU; False: those of a CPU, some of which keep more.
    """

    model: ModelConfig
    plans: tuple[LayerPlan, ...]
    seq_len: int
    engine: EngineConfig
    rows: int = 1
    world: int = 1
    parallel: int = 1
    cuda: bool = True

    @property
    def itemsize(self) -> int:
        """b."""
        return 4 if self.engine.precision == "fp32" else 2

    @property
    def fused_loss(self) -> bool:
        """As `model.fused_loss.takes_fused` decides."""
        return self.engine.loss == "fused" or (self.engine.loss == "auto" and self.cuda)

    @property
    def summed_in_products(self) -> bool:
        """Whether weight gradients go into fp32 sums as they are computed, see `model.products`."""
        return self.lean_optimizer and self.cuda

    @property
    def lean_optimizer(self) -> bool:
        """DeepSpeed's BF16_Optimizer, as `train.bf16` changes it: fp32 gradients whole, moments in shares."""
        return self.engine.zero_stage == 1 and self.itemsize == 2 and not self.engine.offload_optimizer

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.seq_len

    @property
    def local(self) -> int:
        """t."""
        return self.tokens // self.parallel

    @property
    def q_width(self) -> int:
        """A."""
        return self.model.num_heads * head_dim(self.model)

    @property
    def kv_width(self) -> int:
        """K."""
        return self.model.num_kv_heads * head_dim(self.model)

    @property
    def heads_here(self) -> tuple[int, int]:
        """Query and kv heads of this rank inside attention."""
        return self.model.num_heads // self.parallel, max(1, self.model.num_kv_heads // self.parallel)


@dataclass
class Ledger:
    """Bytes alive by part. `take` gives a receipt, `give` takes it back."""

    live: Counter[str] = field(default_factory=Counter)
    host: int = 0  # bytes of page-locked host memory at their highest
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    moment: str = ""
    peak_moment: str = ""
    _receipts: dict[int, tuple[str, int]] = field(default_factory=dict)
    _next: int = 0
    _total: int = 0

    def take(self, part: str, size: float) -> int:
        """Allocate `size` bytes for `part`."""
        self._next += 1
        self._receipts[self._next] = (part, int(size))
        self.live[part] += int(size)
        self._total += int(size)
        if self._total > self.peak:
            self.peak, self.at_peak, self.peak_moment = self._total, dict(self.live), self.moment
        return self._next

    def give(self, *receipts: int) -> None:
        for receipt in receipts:
            part, size = self._receipts.pop(receipt)
            self.live[part] -= size
            self._total -= size

    def touch(self, part: str, *sizes: float) -> None:
        """Allocate all of `sizes`, then free them."""
        self.give(*[self.take(part, size) for size in sizes])


@dataclass(frozen=True)
class StepMemory:
    """What a step takes.

    Attributes:
        peak: bytes on the device at the highest point; `parts` adds up to it.
        moment: when that is.
        host: bytes of host memory per rank, page-locked.
    """

    peak: int
    parts: dict[str, int]
    moment: str
    host: int


def step_memory(job: Job) -> StepMemory:
    """Play one optimizer step (with one micro-batch; more take no more) and read the peak off."""
    from model.memory_layers import Play
    from model.memory_states import States

    ledger = Ledger()
    states = States(job, ledger)
    play = Play(job, ledger, states)
    play.forward()
    play.backward()
    states.reduce_rest()
    states.step()
    parts = {part: ledger.at_peak.get(part, 0) for part in PARTS}
    return StepMemory(ledger.peak, parts, ledger.peak_moment, ledger.host + states.host)
