"""Timing on a GPU: device events around back-to-back runs, median of several; peak memory of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GRAPH_UP_TO = 1 << 15  # tokens; shorter problems are timed inside a CUDA graph, without the host's launches
CAPTURE_FROM = 1 << 19  # tokens; seconds-long problems are warmed up by a capture instead of a run
_TARGET_MS = 100.0  # of measuring per function
_SECOND = 1000.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Timed:
    """Milliseconds of forward, and of forward plus backward; peak GiB, inputs and gradients included."""

    fwd_ms: float
    fwd_bwd_ms: float
    peak_gib: float
    eager_fwd_bwd_ms: float


def measure(
    forward: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], dout: torch.Tensor, tokens: int
) -> Timed:
    """Times `forward` and its backward. Short problems run in a CUDA graph; `eager_fwd_bwd_ms` never does."""

    def fwd() -> Any:
        with torch.no_grad():
            return forward()

    def both() -> Any:
        return torch.autograd.grad(forward(), leaves, dout)

    long = tokens >= CAPTURE_FROM
    if long:
        _warm(both)
        _warm(fwd)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    first = _once_ms(both, 1)
    peak = torch.cuda.max_memory_allocated() / _GIB
    eager = first if long and first > _SECOND else median_ms(both)
    if tokens > GRAPH_UP_TO:
        return Timed(median_ms(fwd), eager, peak, eager)
    return Timed(median_ms(captured(fwd)), median_ms(captured(both)), peak, eager)


def both_ms(forward: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], dout: torch.Tensor) -> float:
    """Milliseconds of forward plus backward in a CUDA graph, from few runs."""
    return median_ms(captured(lambda: torch.autograd.grad(forward(), leaves, dout)), samples=3)


def _warm(run: Callable[[], Any]) -> None:
    """Compiles and plans what `run` needs by capturing it; the kernels themselves do not run."""
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
            run()
    except RuntimeError:  # something in it cannot be captured: then it runs
        torch.cuda.synchronize()
        run()
    torch.cuda.empty_cache()


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, warmed up, as a CUDA graph: a call replays it and returns the tensors it then holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def median_ms(run: Callable[[], Any], samples: int = 5) -> float:
    first = _once_ms(run, 1)
    if first > _SECOND:  # the first run, after the untimed one or the capture, is the measurement
        return first
    if first > _SECOND / 5:
        samples = min(samples, 3)
    repeats = max(1, round(_TARGET_MS / samples / max(first, 1e-3)))
    return sorted(_once_ms(run, repeats) for _ in range(samples))[samples // 2]


def _once_ms(run: Callable[[], Any], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats
