"""Token ids and loss weights as records give them. What cannot be used is a ValueError with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

DEFAULT_KEY = "weight"  # of a message, as chat APIs spell it


def one_weight(value: Any) -> float:
    """A finite number of at least 0 (true and false are none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("a weight is missing or no number of at least 0")
    return float(value)


def token_ids(value: Any, field: str) -> np.ndarray:
    """int64 [n] of a list of whole numbers of at least 0."""
    if not isinstance(value, (list, tuple)) or not all(type(i) is int and 0 <= i < 1 << 32 for i in value):
        raise ValueError(f"field `{field}` is missing or no list of token ids")
    return np.array(value, dtype=np.int64)


def token_weights(value: Any, count: int) -> tuple[float, ...]:
    """One weight for all tokens, or one of each of `count`; not all 0."""
    weights = tuple(map(one_weight, value)) if isinstance(value, (list, tuple)) else (one_weight(value),)
    if len(weights) not in (1, count):
        raise ValueError("weights and token ids differ in number")
    if not any(weights):
        raise ValueError("all weights are 0")
    return weights


def message_weights(messages: Sequence[Any], key: str) -> tuple[float, ...]:
    """Of each message, 1 where it has none; only the assistant's count.

    Empty without `key`; then a message that has a weight all the same is refused rather than read without it.
    """
    given = [message.get(key or DEFAULT_KEY) for message in messages]
    weights = tuple(1.0 if value is None else one_weight(value) for value in given)
    if not key and any(weight != 1 for weight in weights):
        raise ValueError("a message has a weight: set read.weight=weight")
    answers = [weight for weight, message in zip(weights, messages, strict=True) if message["role"] == "assistant"]
    if not any(answers):
        raise ValueError("all weights are 0")
    return weights if key else ()
