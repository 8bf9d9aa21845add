"""Memory of weights, gradients and optimizer under DeepSpeed's ZeRO; see `model.memory` for the ledger.

DeepSpeed's own choices are read off its source (0.19.8) and measured: bf16 with fp32 accumulation in stage 1 is
its BF16_Optimizer, which keeps whole fp32 gradients; the other stages cut them.
"""

from __future__ import annotations

from model.memory import Job, Ledger
from model.shapes import num_parameters

BUCKET = 500_000_000  # elements that are reduced at once, as in `train.engine`
GATHERED = 1_000_000_000  # ZeRO-3: elements of parameters that are whole at the same time, at most
PREFETCH = 50_000_000


class States:
    """The engine's side of a step.

    Attributes:
        host: bytes of host memory per rank.
    """

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self.job, self.ledger = job, ledger
        self.count = num_parameters(job.model)
        self.bucket = min(BUCKET, self.count)
        self.host = 0
        self._receipts: list[int] = []
        self._pending: list[int] = []  # gradients that wait for their bucket to fill
        self._pending_count = 0
        self._hold()

    def _hold(self) -> None:
        """What is there all the time: weights, fp32 master weights, AdamW's moments, gradient buffers."""
        job, take, count = self.job, self.ledger.take, self.count
        stage, size, share = job.engine.zero_stage, job.itemsize, self.count / job.world
        self.ledger.moment = "engine"
        if job.engine.offload_param:
            self.host += int(size * share)
        else:
            take("weights", size * (share if stage == 3 else count))
        masters = 0 if size == 4 and stage == 0 else 4  # stage 0 steps on the weights themselves
        optimizer = (masters + 8) * (count if stage == 0 else share)
        if job.engine.offload_optimizer:
            self.host += int(optimizer + 4 * share)
        else:
            take("optimizer", optimizer)
        if self.job.lean_optimizer:  # a whole fp32 gradient, into which bf16 ones go as they come
            take("gradients", 4 * count)
        elif stage == 3 and not job.engine.offload_optimizer:
            take("gradients", 4 * share)  # whatever the precision, since micro-batches add up in fp32

    def begin_backward(self) -> None:
        """ZeRO's own optimizers allocate the bucket into which gradients are copied for their reduction."""
        if self.job.engine.zero_stage and not self.job.lean_optimizer:
            self._receipts.append(self.ledger.take("communication", self.job.itemsize * self.bucket))

    def gradient(self, count: int) -> None:
        """The gradient of `count` parameters has been computed."""
        stage, size, take = self.job.engine.zero_stage, self.job.itemsize, self.ledger.take
        if self.job.lean_optimizer:
            self.ledger.touch("gradients", size * count)
            return
        if stage <= 1:
            self._receipts.append(take("gradients", size * count))
            return
        # Stages 2 and 3 reduce full buckets and keep this rank's share of the sums in fp32.
        self._pending.append(take("gradients", size * count))
        self._pending_count += count
        if self._pending_count >= self.bucket:
            self._flush()

    def _flush(self) -> None:
        """Reduce what is pending."""
        if self.job.engine.zero_stage == 2 and not self.job.engine.offload_optimizer:
            share = 4 * self._pending_count / self.job.world
            self._receipts.append(self.ledger.take("gradients", share))
        self.ledger.give(*self._pending)
        self._pending, self._pending_count = [], 0

    def gather(self) -> int:
        """ZeRO-3: parameters that are whole while layers run."""
        if self.job.engine.zero_stage < 3:
            return self.ledger.take("communication", 0)
        whole = min(self.count, GATHERED + PREFETCH)
        return self.ledger.take("communication", self.job.itemsize * whole)

    def reduce_rest(self) -> None:
        """After the backward pass: what is left is reduced; BF16_Optimizer and stage 0 start only now."""
        self.ledger.moment = "gradient reduction"
        if self.job.lean_optimizer and self.job.world > 1:
            self.ledger.touch("communication", self.job.itemsize * self.count)
        elif self.job.engine.zero_stage == 0:
            self.ledger.touch("communication", self.job.itemsize * self.bucket)
        self._flush()

    def step(self) -> None:
        """The optimizer step; fused AdamW needs nothing of its own."""
        self.ledger.moment = "optimizer step"
        stage, share = self.job.engine.zero_stage, self.count / self.job.world
        if stage >= 1 and not self.job.lean_optimizer and not self.job.engine.offload_optimizer:
            self.ledger.touch("gradients", 4 * share)  # this rank's gradients, flattened
        self.ledger.give(*self._receipts)
        self._receipts = []
