"""`moba bench attention`: MoBA beside dense attention on the same inputs, in one process on one GPU.

Each row is checked against exact samples first (`eval.bench.check`). Dense attention is torch's
scaled_dot_product_attention with the cuDNN backend, and for shorter rows also with the flash backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conf.errors import UserError
from eval.bench.environment import environment
from eval.bench.shapes import CASES, Case, parse_shape

if TYPE_CHECKING:
    from conf.schema import BenchConfig
    from eval.bench.inputs import Inputs
    from eval.bench.timing import Timed

# What the selected (query, key) pairs alone cost at cuDNN's dense rate: no gate, no gather, no merge.
IDEAL_FWD_FLOPS, IDEAL_BWD_FLOPS = 560e12, 530e12
_HEAD = (
    f"{'seq/heads/kv/dim/block/topk':28s} {'f ms':>8} {'f+b ms':>9} {'eager':>9} {'TFLOP/s':>8} {'of ideal':>8} "
    f"{'GiB':>6} | {'cuDNN f':>8} {'f+b':>9} {'GiB':>6} {'flash f+b':>9} | {'faster':>6}  (documents, routing)"
)


def run(config: BenchConfig) -> Path | None:
    """Measure every row, print the table, write JSON and a picture. Returns the JSON's path, if one was written.

    Raises:
        UserError: no suitable GPU, or rows that make no sense.
        eval.bench.check.CheckFailed: the kernels are wrong; nothing more is measured.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise UserError("bench attention needs a Hopper GPU (H100, H200): the kernels run on no other")
    if config.rule:
        from eval.bench.rule import refresh

        return refresh(config)
    cases = _cases(config)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; bf16")
    print("rows up to 32768 tokens: both sides in a CUDA graph (column eager: without)\n" + _HEAD, flush=True)
    dense: dict[tuple[int, ...], tuple[Timed, Timed | None]] = {}
    rows = [_row(case, config, dense) for case in cases]
    report = {**environment(name), "rows": rows}
    if not config.out:
        return None
    from eval.files import write_json

    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    if config.plot:
        from eval.bench.picture import draw

        draw(report, path.with_suffix(".png"))
    print(f"wrote {path}")
    return path


def _cases(config: BenchConfig) -> list[Case]:
    """The rows asked for; by default the official ones, with the packed and other routed ones unless named."""
    usual = config.documents == 1 and config.routing == "uniform"
    if not config.rows and usual:
        return list(CASES)
    shapes = [parse_shape(text) for text in config.rows] or [
        case.shape for case in CASES if case == Case(case.shape)
    ]
    return [Case(shape, config.documents, config.routing) for shape in shapes]


def _row(
    case: Case, config: BenchConfig, dense: dict[tuple[int, ...], tuple[Timed, Timed | None]]
) -> dict[str, Any]:
    from eval.bench.check import check
    from eval.bench.inputs import make_inputs
    from eval.bench.timing import measure
    from model.moba.api import moba_attention

    shape = case.shape
    x = make_inputs(shape, case.documents, case.routing, dtype=torch.bfloat16)
    _, pairs = check(x)
    torch.cuda.empty_cache()
    cu = None if case.documents == 1 else x.cu_seqlens
    longest = int(x.cu_seqlens.diff().max())

    def moba() -> Tensor:
        return moba_attention(
            x.q, x.k, x.v, block_size=shape.block_size, topk=shape.topk, cu_seqlens=cu, max_seqlen=longest,
            backend="triton",
        )  # fmt: skip

    ours = measure(moba, (x.q, x.k, x.v), x.dout, shape.seq_len)
    torch.cuda.empty_cache()
    key = (shape.seq_len, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    if case.documents == 1 and config.dense and key not in dense:
        dense[key] = _dense(x, flash=shape.seq_len <= config.flash_up_to)
        torch.cuda.empty_cache()
    theirs, flash = dense.get(key, (None, None)) if case.documents == 1 else (None, None)
    _print(case, ours, theirs, flash, pairs, x)
    return {
        **asdict(shape),
        "documents": case.documents,
        "routing": case.routing,
        "fwd_ms": ours.fwd_ms,
        "fwd_bwd_ms": ours.fwd_bwd_ms,
        "dense_fwd_ms": theirs.fwd_ms if theirs else None,
        "dense_fwd_bwd_ms": theirs.fwd_bwd_ms if theirs else None,
        "peak_gib": ours.peak_gib,
        "dense_peak_gib": theirs.peak_gib if theirs else None,
    }


def _dense(x: Inputs, *, flash: bool) -> tuple[Timed, Timed | None]:
    from torch.nn.attention import SDPBackend

    from eval.bench.timing import measure

    q, k, v, dout = _dense_inputs(x)
    kept = sum(t.numel() * t.element_size() for t in (x.q, x.k, x.v, x.dout)) / (1 << 30)

    def timed(backend: SDPBackend) -> Timed:
        from dataclasses import replace

        found = measure(_sdpa(q, k, v, backend), (q, k, v), dout, x.shape.seq_len)
        return replace(found, peak_gib=found.peak_gib - kept)  # the originals, which only MoBA uses

    return timed(SDPBackend.CUDNN_ATTENTION), timed(SDPBackend.FLASH_ATTENTION) if flash else None


def _dense_inputs(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout as [1, H, T, D] with the same values, made contiguous outside of what is timed."""
    q, k, v = (t.detach().transpose(0, 1)[None].contiguous().requires_grad_() for t in (x.q, x.k, x.v))
    return q, k, v, x.dout.transpose(0, 1)[None].contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: Any) -> Callable[[], Tensor]:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def _print(case: Case, ours: Timed, dense: Timed | None, flash: Timed | None, pairs: int, x: Inputs) -> None:
    """One line of the table. FLOPs: 2 products of 2 D per (query, key) forward, 5 backward."""
    shape = case.shape
    own = sum(_own_pairs(length, shape.block_size) for length in x.cu_seqlens.diff().tolist()) * shape.num_heads
    fwd = 4 * shape.head_dim * (pairs * shape.block_size + own)
    ideal_ms = (fwd / IDEAL_FWD_FLOPS + 2.5 * fwd / IDEAL_BWD_FLOPS) * 1e3
    text = (
        f"{shape!s:28s} {ours.fwd_ms:8.3f} {ours.fwd_bwd_ms:9.3f} {ours.eager_fwd_bwd_ms:9.3f} "
        f"{3.5 * fwd / ours.fwd_bwd_ms / 1e9:8.0f} {ideal_ms / ours.fwd_bwd_ms:8.2f} {ours.peak_gib:6.2f} |"
    )
    if dense is not None:
        other = f"{flash.fwd_bwd_ms:9.2f}" if flash is not None else f"{'':9s}"
        text += (
            f" {dense.fwd_ms:8.2f} {dense.fwd_bwd_ms:9.2f} {dense.peak_gib:6.2f} {other} |"
            f" {dense.fwd_bwd_ms / ours.fwd_bwd_ms:5.2f}x"
        )
    print(text if case == Case(shape) else f"{text} ({case.documents}, {case.routing})", flush=True)


def _own_pairs(length: int, block_size: int) -> int:
    """(query, key) pairs inside the blocks of one document."""
    full, rest = divmod(length, block_size)
    return full * block_size * (block_size + 1) // 2 + rest * (rest + 1) // 2
