"""What a loss evaluation found: means over tokens with their errors. How they are made: `eval.loss`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, in nats, and its uncertainty.

    `stderr` treats documents, not tokens, as independent (the linearised variance of a ratio of sums over
    documents), so it does not shrink with the length of a document. None with fewer than two documents.
    """

    loss: float | None
    tokens: int
    documents: int
    stderr: float | None


@dataclass(frozen=True)
class Bucket:
    """Loss at positions `start` <= p < `end`: of predicting token p + 1 from tokens 0..p of its document."""

    start: int
    end: int
    estimate: Estimate


@dataclass(frozen=True)
class LossReport:
    """Held-out mean over all valid tokens; trailing loss and buckets over full-length rows only."""

    heldout: Estimate
    trailing: Estimate
    trailing_tokens: int
    seq_len: int
    buckets: tuple[Bucket, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(line: Tensor) -> Estimate:
    """From a line of `eval.loss.LossSums.table`, float64 [6]. Waits for the device."""
    loss, tokens, clusters, loss_loss, loss_tokens, tokens_tokens = line.tolist()
    if tokens == 0:
        return Estimate(None, 0, 0, None)
    mean = loss / tokens
    if clusters < 2:
        return Estimate(mean, int(tokens), int(clusters), None)
    residual = max(0.0, loss_loss - 2 * mean * loss_tokens + mean * mean * tokens_tokens)
    stderr = (residual * clusters / (clusters - 1)) ** 0.5 / tokens
    return Estimate(mean, int(tokens), int(clusters), stderr)
