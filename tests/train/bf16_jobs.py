"""What the gloo workers of the bf16 tests do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.train import jobs


class Two(nn.Module):
    """Two matrices, the second of which a step may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        out: Tensor = self.first(x)
        return (out + self.second(x)).float() if both else out.float()


def stock(lean: bool) -> None:
    """From now on engines of this process keep DeepSpeed's optimizer as it is, unless `lean`."""
    from train import bf16, engine

    engine.make_lean = bf16.make_lean if lean else lambda engine: None


def train(lean: bool, tied: bool) -> jobs.Result:
    """Steps of two micro-batches on two ranks, clipped."""
    stock(lean)
    try:
        return jobs.train(1, "bf16", tied=tied)
    finally:
        stock(True)


def joined(join: bool) -> tuple[jobs.Result, list[bool]]:
    """One step, with q, k, v as one projection if `join`; and which layers' projections were joined."""
    from dataclasses import replace
    from unittest.mock import patch

    from model.fused import PLAIN
    from model.products import Joint

    seen, build = list[bool](), jobs.make_run

    def noted(*args: Any, **kwargs: Any) -> Any:
        run = build(*args, **kwargs)
        seen.extend(m.is_joined for m in run.engine.module.modules() if isinstance(m, Joint))
        return run

    pieces = replace(PLAIN, joint=join)
    with patch("train.execution.pieces", lambda name, device: pieces), patch.object(jobs, "make_run", noted):
        return jobs.train(1, "bf16", max_steps=1), seen


def one_pass(wanted: bool) -> tuple[jobs.Result, Tensor]:
    """One step of two ranks, by AdamW in one pass (interpreted) if `wanted`; and the model's weights."""
    import os
    from unittest.mock import patch

    kept, build = list[Tensor](), jobs.make_run

    def switched(*args: Any, **kwargs: Any) -> Any:
        run = build(*args, **kwargs)
        assert not run.engine.optimizer.one_pass
        run.engine.optimizer.one_pass = wanted
        kept.extend(run.engine.optimizer.bf16_groups_flat)
        return run

    with patch.dict(os.environ, TRITON_INTERPRET="1"), patch.object(jobs, "make_run", switched):
        result = jobs.train(1, "bf16", max_steps=1)
    return result, torch.cat([flat.detach().float() for flat in kept])


def freed() -> list[bool]:
    """Whether optimizer and master weights of an engine are gone after its end."""
    import gc
    import weakref

    run = jobs.make_run(jobs.tiny_config(1, "bf16"))
    optimizer = run.engine.optimizer
    gone = [weakref.ref(optimizer), *(weakref.ref(master) for master in optimizer.fp32_groups_flat_partition)]
    run.engine.destroy()
    del run, optimizer
    gc.collect()
    return [reference() is None for reference in gone]


def moments_stay(zero_stage: int) -> list[bool]:
    """Whether a second reset of the optimizer leaves its moments where they lie, and at zero."""
    from train.state import _inner, _masters, reset_optimizer

    run = jobs.make_run(jobs.tiny_config(zero_stage, "bf16"))
    moments = [_inner(run.engine).state[master]["exp_avg"] for master in _masters(run.engine)]
    places = [moment.fill_(3.0).data_ptr() for moment in moments]
    reset_optimizer(run.engine, 5)
    after = [_inner(run.engine).state[master]["exp_avg"] for master in _masters(run.engine)]
    run.engine.destroy()
    return [m.data_ptr() == place and not m.any() for m, place in zip(after, places, strict=True)]


def absent(lean: bool, accumulation: int) -> list[dict[str, Tensor]]:
    """AdamW's first moments after each of three steps; the second leaves a matrix out."""
    from train.engine import build_engine, init_distributed, set_lr

    stock(lean)
    mesh = init_distributed(1)
    torch.manual_seed(0)
    engine = build_engine(Two(), jobs.tiny_config(1, "bf16"), 1, accumulation, mesh)
    stock(True)
    set_lr(engine, 1e-2)
    found = []
    for step in range(3):
        for index in range(accumulation):
            draw = torch.Generator().manual_seed(10 * step + 3 * index + mesh.rank)
            x = torch.randn(4, 6, generator=draw).bfloat16()
            engine.backward(engine(x, step != 1).square().mean(), scale_wrt_gas=False)
            engine.step()
        found.append(_moments(engine))
    engine.destroy()
    return found


def exact_sum() -> tuple[Tensor, bool]:
    """First moment after gradients of 1 and 1/512 on a lone rank, and whether anything is still reduced."""
    from train.engine import build_engine, init_distributed

    config = jobs.tiny_config(1, "bf16")
    config.optim.clip = 0.0
    engine = build_engine(Two(), config, 1, 2, init_distributed(1))
    for size in (1.0, 2.0**-9):
        engine.backward(engine(torch.full((1, 6), size).bfloat16(), True).sum(), scale_wrt_gas=False)
        engine.step()
    moment, reduces = _moments(engine)["first.weight"], bool(engine.enable_backward_allreduce)
    engine.destroy()
    return moment, reduces


def _moments(engine: Any) -> dict[str, Tensor]:
    from train.state import get_full, named_parameters

    return {name: get_full(engine, p, "exp_avg").clone() for name, p in named_parameters(engine)}


def not_finite() -> tuple[Tensor, Tensor, float]:
    """A matrix before and after a step whose gradient is not finite, and the norm reported."""
    from train.engine import build_engine, grad_norm, init_distributed, set_lr
    from train.state import get_full

    torch.manual_seed(0)
    engine = build_engine(Two(), jobs.tiny_config(1, "bf16"), 1, 1, init_distributed(1))
    set_lr(engine, 1e-2)
    first = engine.module.first.weight
    before = get_full(engine, first, "").clone()
    engine.backward(engine(torch.full((1, 6), float("inf")).bfloat16(), True).sum(), scale_wrt_gas=False)
    engine.step()
    found = before, get_full(engine, first, "").clone(), float(grad_norm(engine, None))
    engine.destroy()
    return found
