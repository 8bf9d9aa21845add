"""Time of whole computations on any device, and a model to time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from conf.schema import ModelConfig, RopeConfig
from model.transformer import CausalLM

SHORT = 2.0  # seconds; what takes less is measured three times


def random_model(shape: ModelConfig, place: torch.device, dtype: torch.dtype) -> CausalLM:
    """A model in evaluation mode whose matrices are normal with 0.02, drawn on the device."""
    with torch.device("meta"):
        model = CausalLM(shape, RopeConfig())
    model = model.to(dtype).to_empty(device=place).eval().requires_grad_(False)
    g = torch.Generator(place).manual_seed(0)
    for weight in model.parameters():
        weight.normal_(0, 0.02, generator=g) if weight.dim() > 1 else weight.fill_(1)
    return model


def replayed(run: Callable[[], Any], place: torch.device) -> float:
    """Median seconds of `run`; on a GPU inside a CUDA graph, without the host's launches."""
    if place.type == "cuda":
        from eval.bench.timing import captured, median_ms

        return median_ms(captured(run)) / 1e3
    run()
    return seconds(lambda: once(run, place))


def once(run: Callable[[], Any], place: torch.device) -> float:
    """Seconds of one run, everything before it finished."""
    sync = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def seconds(timed: Callable[[], float]) -> float:
    """Median of what `timed` returns; a single value if it is long."""
    values = [timed()]
    while len(values) < 3 and values[0] < SHORT:
        values.append(timed())
    return sorted(values)[len(values) // 2]
