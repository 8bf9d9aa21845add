"""The `varlen` backend on the flash-attn package: agreement with the oracle and the Triton kernels, and time.

    python -m benchmarks.varlen benchmarks/results/varlen-h200.json

Beside it the same backend on the copy of flash-attention that CUDA builds of torch carry, which `model.flash`
takes where the package is missing. Needs flash-attn and a Hopper GPU.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.bench.environment import environment
from eval.bench.inputs import Inputs, make_inputs
from eval.bench.shapes import Shape
from eval.bench.timing import median_ms
from eval.files import write_json
from model import flash
from model.moba.api import attend_blocks, choose_blocks, moba_attention
from model.moba.reference import reference_attend

SHAPES = (
    Shape(1 << 13, 32, 8, 128, 512, 3),
    Shape(1 << 15, 32, 8, 128, 2048, 3),
    Shape(1 << 15, 32, 8, 128, 512, 3),
    Shape(1 << 15, 32, 8, 64, 512, 3),
)
_SMALL = 2048  # tokens of the comparison with the fp32 oracle
_NAMES = ("out", "dq", "dk", "dv")


def main(path: Path) -> None:
    """Checks, then times every shape; nothing is written if a check fails."""
    import flash_attn  # type: ignore[import-not-found, unused-ignore]

    kernels: dict[str, flash.FlashKernels] = {"package": flash.PackageKernels(), "torch": flash.TorchKernels()}
    rows = []
    for shape in SHAPES:
        row: dict[str, Any] = asdict(shape)
        for name, some in kernels.items():
            flash._kernels = partial(_same, some)  # type: ignore[assignment]
            row[f"{name}_error"] = _error(shape)
            row[f"{name}_difference"] = _difference(shape)
            row[f"{name}_fwd_ms"], row[f"{name}_fwd_bwd_ms"] = _time(shape, "varlen")
        row["triton_fwd_ms"], row["triton_fwd_bwd_ms"] = _time(shape, "triton")
        print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        rows.append(row)
    report = {**environment(torch.cuda.get_device_name()), "flash_attn": flash_attn.__version__, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)


def _same(kernels: flash.FlashKernels) -> flash.FlashKernels:
    return kernels


def _run(x: Inputs, leaves: tuple[Tensor, ...], ids: Tensor, dout: Tensor, backend: str) -> tuple[Tensor, ...]:
    q, k, v = leaves
    out = attend_blocks(q, k, v, ids, block_size=x.shape.block_size, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def _worst(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], allowed: float) -> float:
    """The largest relative error of out, dq, dk, dv."""
    errors = [
        float((a.float() - e.float()).norm() / e.float().norm()) for a, e in zip(actual, expected, strict=True)
    ]
    if not max(errors) < allowed:
        raise RuntimeError(f"varlen is wrong: {dict(zip(_NAMES, errors, strict=True))}, allowed {allowed}")
    return max(errors)


def _error(shape: Shape) -> float:
    """Against the fp32 oracle on a short row with the same blocks."""
    size = min(shape.block_size, _SMALL // 4)
    x = make_inputs(Shape(_SMALL, 8, 2, shape.head_dim, size, shape.topk), 1, "uniform", dtype=torch.bfloat16)
    ids = choose_blocks(x.q, x.k, block_size=size, topk=shape.topk, backend="varlen")
    q, k, v = wide = tuple(t.detach().float().requires_grad_() for t in (x.q, x.k, x.v))
    out = reference_attend(q, k, v, ids, block_size=size, cu_seqlens=x.cu_seqlens)[0]
    exact = (out.detach(), *torch.autograd.grad(out, wide, x.dout.float()))
    return _worst(_run(x, (x.q, x.k, x.v), ids, x.dout, "varlen"), exact, 8e-3)


def _difference(shape: Shape) -> float:
    """Against the Triton kernels on the full row with the same blocks."""
    x = make_inputs(shape, 1, "uniform", dtype=torch.bfloat16)
    leaves = (x.q, x.k, x.v)
    ids = choose_blocks(x.q, x.k, block_size=shape.block_size, topk=shape.topk, backend="triton")
    varlen, triton = (_run(x, leaves, ids, x.dout, backend) for backend in ("varlen", "triton"))
    return _worst(varlen, triton, 1.6e-2)


def _time(shape: Shape, backend: str) -> tuple[float, float]:
    """Forward, and forward plus backward, the choice of blocks included; launched from Python, as in training."""
    x = make_inputs(shape, 1, "uniform", dtype=torch.bfloat16)
    leaves = (x.q, x.k, x.v)

    def forward() -> Tensor:
        return moba_attention(x.q, x.k, x.v, block_size=shape.block_size, topk=shape.topk, backend=backend)

    with torch.no_grad():
        fwd = median_ms(forward)
    return fwd, median_ms(lambda: torch.autograd.grad(forward(), leaves, x.dout))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
