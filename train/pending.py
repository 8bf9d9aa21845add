"""The metrics of a step whose numbers may still be on their way from the device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from train.metrics import Row


class Stopwatch:
    """Seconds between construction and `stop` as the device sees them; on a GPU measured in its own queue."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._times = [time.perf_counter()]

    def stop(self) -> None:
        if self._events is not None:
            self._events[1].record()
        self._times.append(time.perf_counter())

    def seconds(self) -> float:
        """Call when the device has passed `stop`."""
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]


@dataclass(frozen=True)
class Outcome:
    """What a step brought, summed over ranks. The order is that of `train.loop.train_step`'s tensor."""

    loss_sum: float  # nats
    num_valid: float  # tokens with a label
    trailing_sum: float
    num_trailing: float
    stopping: float  # ranks that were asked to stop
    grad_norm: float  # global, before clipping
    saving: float  # ranks whose checkpoint is still being written
    save_failed: float  # ranks that could not write
    verdict: float  # of `train.guard`: 0 for a good step
    weight: float  # sum of the weights of the tokens with a label: num_valid where there are none

    @property
    def loss(self) -> float:
        """Mean over the valid tokens of the global batch, by weight."""
        return self.loss_sum / (self.weight or 1.0)

    @property
    def stop(self) -> bool:
        return self.stopping > 0


class PendingRow:
    """Holds `train_step`'s sums; `finish` is called while the next step runs.

    Args:
        sums: float64 on the device, as returned by `train.loop.train_step`.
        row: what is known of the step already.
        timer: stopped.
        tokens: of the step.
    """

    def __init__(self, sums: Tensor, row: Row, timer: Stopwatch, tokens: int) -> None:
        self.row, self._timer, self._tokens = row, timer, tokens
        self._outcome: Outcome | None = None
        self._host = sums
        self._copied: torch.cuda.Event | None = None
        if sums.is_cuda:
            self._host = torch.empty_like(sums, device="cpu", pin_memory=True)
            self._host.copy_(sums, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def finish(self) -> Outcome:
        """Wait for the numbers. Every rank gets the same."""
        if self._outcome is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._outcome = Outcome(*self._host.tolist())
        return self._outcome

    def finished_row(self) -> Row:
        """The step's row of the metrics."""
        outcome = self.finish()
        row = self.row | {"loss": outcome.loss, "grad_norm": outcome.grad_norm}
        row |= {"valid_tokens": int(outcome.num_valid), "tokens_per_s": self._tokens / self._timer.seconds()}
        if outcome.weight != outcome.num_valid:
            row["loss_weight"] = outcome.weight
        if outcome.num_trailing:
            row["trailing_loss"] = outcome.trailing_sum / outcome.num_trailing
            row["trailing_tokens"] = int(outcome.num_trailing)
        return row
