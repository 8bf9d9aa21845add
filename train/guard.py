"""Bad steps: a loss or gradient norm that is not finite, or far above what was usual. Seen on the device, in time.

The verdict on a step is reached between its backward pass and its update, from numbers that are global by then,
and reduced over all ranks once more: they leave the update out alike, without waiting for the device. The host
reads it one step late, with the rest of the step's numbers, and then does what `guard` says.

A spike is a loss above `spike_factor` times the median loss of the last `window` good steps of the stage, or a
gradient norm above `norm_factor` times their median norm. The medians are over the steps the host has read, and a
stage has no spikes before it has `window` good steps.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import GuardConfig
from train.engine import DeepSpeedEngine, grad_norm
from train.files import write_durably
from train.optim import GuardedAdamW

NONFINITE, SPIKE = 1.0, 2.0  # verdicts; 0 is a good step
INF = float("inf")


class Rollback(Exception):
    """Go back to the newest checkpoint of the run; what to leave out then is in its `guard.jsonl`."""


class Diverged(FloatingPointError):
    """A bad step, and the configuration says to stop. Nothing of it was saved."""


@dataclass(frozen=True)
class Decision:
    """What is done about a bad step, and why; `action`: stop, skip or rollback."""

    action: str
    reason: str


class Guard:
    """Watches the steps of one stage. `recent`: losses and norms of its last good steps, kept with the state."""

    def __init__(self, config: GuardConfig, engine: DeepSpeedEngine, recent: list[list[float]]) -> None:
        self._config, self._engine, self._recent = config, engine, recent
        self._loss: Tensor | None = None
        self._own_norm: Tensor | None = None
        self._verdict: Tensor | None = None
        self._bad_steps = 0
        self._limits = self._new_limits()
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        assert isinstance(inner, GuardedAdamW), type(inner)
        inner.veto = lambda: self.verdict() > 0

    def arm(self, loss: Tensor, own_norm: Tensor | None) -> None:
        """Before the engine's step: its mean loss over all ranks, float64 []."""
        self._loss, self._own_norm, self._verdict = loss, own_norm, None

    def verdict(self) -> Tensor:
        """Float64 [] on the device, the same on every rank. Collective when first asked for after `arm`.

        The norm must be known: ask from the inner optimizer's step on, not before.
        """
        if self._verdict is None:
            assert self._loss is not None
            loss = self._loss
            norm = grad_norm(self._inner_norm(), self._own_norm)
            loss_limit, norm_limit = self._limits
            spike = SPIKE * ((loss > loss_limit) | (norm > norm_limit)).double()
            # DeepSpeed writes -1 for a norm that is not finite.
            sound = torch.isfinite(loss) & torch.isfinite(norm) & (norm >= 0)
            self._verdict = torch.where(sound, spike, torch.full_like(spike, NONFINITE))
            dist.all_reduce(self._verdict, op=dist.ReduceOp.MAX)
        return self._verdict

    def _inner_norm(self) -> Any:
        """Something `grad_norm` can ask: ZeRO's optimizer knows the norm before the engine does."""
        return self._engine if self._own_norm is not None else _OptimizerNorm(self._engine)

    def judge(self, verdict: float, loss: float, norm: float) -> Decision | None:
        """What to do about a step whose numbers have arrived; None for a good one. On every rank alike."""
        if not verdict:
            self._recent.append([loss, norm])
            del self._recent[: -self._config.window]
            self._limits = self._new_limits()
            return None
        action = self._config.nonfinite if verdict == NONFINITE else self._config.spike
        numbers = f"loss {loss:.6g}, gradient norm {norm:.6g}"
        reason = f"{numbers}: not finite"
        if verdict != NONFINITE:
            reason = f"{numbers}: above the limits {self._limits[0]:.6g} and {self._limits[1]:.6g}"
        self._bad_steps += 1
        if action == "skip" and self._bad_steps > self._config.limit:
            return Decision("stop", f"{reason}; more than guard.limit={self._config.limit} bad steps")
        return Decision(action, reason)

    def _new_limits(self) -> tuple[float, float]:
        config = self._config
        if config.spike == "off" or len(self._recent) < config.window:
            return INF, INF
        medians = [statistics.median(values) for values in zip(*self._recent, strict=True)]
        factors = (config.spike_factor, config.norm_factor)
        loss, norm = (median * factor if factor else INF for median, factor in zip(medians, factors, strict=True))
        return loss, norm


class _OptimizerNorm:
    """The engine's `get_global_grad_norm` while ZeRO's optimizer is inside its step."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.device, self._optimizer = engine.device, engine.optimizer

    def get_global_grad_norm(self) -> Any:
        return self._optimizer._global_grad_norm


def record(path: Path, event: dict[str, Any]) -> None:
    """Append one event to `guard.jsonl`, durably: a rollback that is forgotten would repeat itself. One rank."""
    old = path.read_bytes() if path.is_file() else b""
    write_durably(path.parent, f".tmp-{path.name}", old + json.dumps(event).encode() + b"\n")
    path.with_name(f".tmp-{path.name}").replace(path)


def left_out(path: Path, stage: str) -> tuple[set[int], int]:
    """Steps of the stage (counted from 0) whose data is left out, and the number of rollbacks so far. One rank."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    events = [json.loads(line) for line in lines]
    mine = [event for event in events if event["stage"] == stage and event["action"] == "rollback"]
    return {step for event in mine for step in range(*event["left_out"])}, len(mine)
