"""Made-up input of `moba bench step`, the check that a step computed what it should, and what rows say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from conf.schema import TrainConfig
from data.batch import Batch
from eval.bench.environment import commit, today
from model.flops import flops_per_token
from model.shapes import parameter_shapes
from train.bench_cases import Case
from train.mesh import Mesh


def synthetic(seq_len: int, vocab_size: int, seed: int) -> Batch:
    """One row of uniformly random tokens, one document."""
    ids = torch.randint(vocab_size, (1, seq_len + 1), generator=torch.Generator().manual_seed(seed))
    borders = torch.tensor([0, seq_len], dtype=torch.int32)
    positions = torch.arange(seq_len)[None]
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, borders, seq_len)


def random_weights(config: TrainConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Weights by name as `model.transformer.drawn_weights` has them, but drawn on the device: seconds less."""
    draw = torch.Generator(device).manual_seed(config.seed)
    for name, shape in parameter_shapes(config.model).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        else:
            std = config.model.init_std
            yield name, torch.empty(shape, device=device).normal_(0.0, std, generator=draw)


def check_loss(sums: Tensor, config: TrainConfig) -> None:
    """No number is reported of a step that computes something else: random tokens cost about ln(vocabulary)."""
    loss, norm = float(sums[0] / sums[1]), float(sums[5])
    expected = math.log(config.model.vocab_size)
    if not (abs(loss - expected) < 0.15 * expected and math.isfinite(norm) and norm > 0):
        raise FloatingPointError(
            f"loss {loss:.3f}, gradient norm {norm:.3g}: random tokens should cost {expected:.3f}"
        )


def rates(case: Case, config: TrainConfig, plans: Any, seconds: float, mesh: Mesh) -> dict[str, Any]:
    """Tokens/s of the job, useful FLOP/s of each process: neither recomputation nor the gate counts as useful."""
    tokens = case.seq_len * mesh.dp_world
    useful = flops_per_token(config.model, case.seq_len, plans)
    flops = (useful.dense + useful.attention) * tokens / mesh.world
    return {"tokens_per_s": tokens / seconds, "flops": flops, "flops_per_s": flops / seconds}


def describe_case(case: Case, mesh: Mesh) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu"
    where = {
        "device": device,
        "torch": torch.__version__,
        "commit": commit(),
        "date": today(),
        "processes": mesh.world,
        "model": asdict(case.config.model),
    }
    return {"case": case.text, "engine": asdict(case.config.engine), "mesh": asdict(case.config.mesh), **where}
