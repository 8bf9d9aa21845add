"""Where the time of a step goes: marks at the borders of modules, in the order in which the device passes them.

A mark is an event in the device's own queue (the wall clock on a CPU). The time between two marks belongs to the
innermost part open at the first one, so the parts add up to the step. Between recomputation and backward pass the
border is the next module's: their sum by part is exact, the split is not. Copies and collectives that run in other
queues beside the computation show only where it waits for them.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from train.mesh import Mesh

# The end of a module's name -> the part it belongs to. What a block does besides these is attention: scores and
# weighted values, with RoPE, the exchange under sequence parallelism and the residual sums.
PARTS = {
    "embed_tokens": "embedding",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "model.norm": "norm",
    "q_proj": "projections",
    "k_proj": "projections",
    "v_proj": "projections",
    "o_proj": "projections",
    "qkv": "projections",
    "qkv_proj": "projections",
    "mlp": "mlp",
    "lm_head": "loss",
}
_BLOCK = re.compile(r"model\.layers\.\d+")
ATTENTION, OTHER, OPTIMIZER = "attention", "other", "optimizer"
FORWARD, RECOMPUTE, BACKWARD, STEP = "forward", "recompute", "backward", "step"


class Timeline:
    """Marks of one step. `open` and `close` nest; a `close` of a part that is not open is ignored."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, str]] = []  # (part, phase)
        self._marks: list[tuple[Any, str, str]] = []  # (moment, part, phase) from this moment on
        self.phase = FORWARD

    def mark(self, phase: str | None = None) -> None:
        """From now on the time belongs to the innermost open part, in `phase` if one is given."""
        moment: Any = time.perf_counter()
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        phase = phase or self.phase
        part, opened_in = self._open[-1] if self._open else (OTHER, phase)
        if phase == RECOMPUTE and opened_in != RECOMPUTE:
            part = ATTENTION  # a block recomputes itself in the middle of the backward pass of one of its parts
        self._marks.append((moment, part, phase))

    def open(self, part: str, phase: str) -> None:
        if phase == BACKWARD:  # a recomputation ends where its last tensor is there, without a word
            self._open = [item for item in self._open if item[1] != RECOMPUTE]
        self._open.append((part, phase))
        self.mark(phase)

    def close(self, part: str, phase: str) -> None:
        if (part, phase) in self._open:
            while self._open.pop() != (part, phase):
                pass
        self.mark(phase)

    def seconds(self) -> dict[str, dict[str, float]]:
        """part -> phase -> seconds. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for (start, part, phase), (end, _, _) in zip(self._marks, self._marks[1:], strict=False):
            total[part][phase] += start.elapsed_time(end) / 1000 if self._cuda else end - start
        return {part: dict(phases) for part, phases in total.items()}


class TimedEngine:
    """An engine whose backward pass and optimizer step mark their borders; everything else is the engine's own."""

    def __init__(self, engine: Any, timeline: Timeline) -> None:
        self._engine, self._timeline = engine, timeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._timeline.phase = FORWARD
        self._timeline.mark()
        out = self._engine(*args, **kwargs)
        self._timeline.mark()
        return out

    def backward(self, *args: Any, **kwargs: Any) -> None:
        self._timeline.phase = BACKWARD
        self._timeline.mark()
        self._engine.backward(*args, **kwargs)

    def step(self) -> None:
        self._timeline.phase = STEP
        self._timeline.open(OPTIMIZER, STEP)
        self._engine.step()
        self._timeline.close(OPTIMIZER, STEP)


def time_parts(engine: Any, timeline: Timeline, run_step: Callable[[Any], Tensor]) -> Tensor:
    """`run_step(timed engine)`, with marks around all modules of the model put into `timeline`."""
    hooks: list[Any] = []
    for name, module in engine.module.named_modules():
        part = next((label for end, label in PARTS.items() if name == end or name.endswith("." + end)), None)
        part = ATTENTION if _BLOCK.fullmatch(name) else part
        if part is not None:
            hooks += _watch(module, part, timeline)
    try:
        timeline.mark()
        out = run_step(TimedEngine(engine, timeline))
        timeline.mark()
        return out
    finally:
        for hook in hooks:
            hook.remove()


def _watch(module: nn.Module, part: str, timeline: Timeline) -> list[Any]:
    def forward_phase() -> str:
        return RECOMPUTE if timeline.phase == BACKWARD else timeline.phase

    hooks = [
        module.register_forward_pre_hook(lambda *_: timeline.open(part, forward_phase())),
        module.register_forward_hook(lambda *_: timeline.close(part, forward_phase())),
    ]
    if part != "embedding":  # its input has no gradient: nothing would tell that its backward is over
        hooks += [
            module.register_full_backward_pre_hook(lambda *_: timeline.open(part, BACKWARD)),
            module.register_full_backward_hook(lambda *_: timeline.close(part, BACKWARD)),
        ]
    return hooks


def communication(run_step: Callable[[], Tensor], mesh: Mesh, synchronize: Callable[[], None]) -> float:
    """Seconds of collectives in one step, beside or between computation; 0 with one process."""
    if mesh.world == 1:
        return 0.0
    from torch.profiler import ProfilerActivity, profile

    cuda = mesh.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        run_step()
        synchronize()
    if cuda:
        events = [(e.key, e.self_device_time_total) for e in trace.key_averages()]
        return sum(spent for name, spent in events if name.startswith("nccl")) / 1e6
    return sum(e.cpu_time_total for e in trace.key_averages() if e.key.startswith("gloo:")) / 1e6
