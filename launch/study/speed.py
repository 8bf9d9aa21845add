"""The study of speed: attention at a fixed share of blocks, MoBA and dense in one process, each row checked."""

from __future__ import annotations

import math
from typing import Any

from conf.errors import UserError
from launch.study.places import Places
from launch.study.plan import Plan

LONG_MS = 2000.0  # a run this long is timed once
SAMPLES = 12  # queries per row that are computed exactly
ERROR = 1e-2  # relative, of bf16 inputs and output
FIXED = "fixed-share.json"
Json = dict[str, Any]


def measure_speed(plan: Plan, values: dict[str, Any], places: Places) -> Json | None:
    """Time forward passes at every row `seq_len/heads/kv_heads/head_dim/block_size/topk` of the scale.

    Written after each row. Rows of more than `dense_up_to` tokens are timed without dense attention.

    Returns:
        What was written; None where there is no Hopper GPU, and nothing is written.
    Raises:
        eval.bench.check.CheckFailed: the kernels are wrong; the row and all after it have no times.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("no Hopper GPU here: only the stored measurements are shown", flush=True)
        return None
    from eval.bench.environment import environment
    from eval.bench.inputs import make_inputs
    from eval.bench.shapes import parse_shape
    from eval.files import write_json

    report: Json = {**environment(torch.cuda.get_device_name()), "rows": []}
    for text in values["rows"]:
        shape = parse_shape(text)
        x = make_inputs(shape, 1, "uniform", dtype=torch.bfloat16)
        row = _row(x)
        report["rows"].append(row)
        write_json(places.out / FIXED, report)  # dense attention may take a minute, or all the memory
        if shape.seq_len <= int(values["dense_up_to"]):
            row["dense_fwd_ms"] = _dense_ms(x)
            write_json(places.out / FIXED, report)
        print(row, flush=True)
        del x
    return report


def _row(x: Any) -> Json:
    """Checked and timed MoBA on these inputs."""
    import torch

    from model.moba.api import choose_blocks, moba_attention

    shape = x.shape
    how = {"block_size": shape.block_size, "topk": shape.topk, "backend": "triton"}
    with torch.no_grad():
        ids = choose_blocks(x.q, x.k, **how)
        out = moba_attention(x.q, x.k, x.v, **how)  # not timed: it may compile kernels, for minutes
        error = _checked(x, ids, out)
        del ids, out
        torch.cuda.empty_cache()
        ours = _ms(lambda: moba_attention(x.q, x.k, x.v, **how))
    return {**vars(shape), "error": error, "fwd_ms": ours, "dense_fwd_ms": None}


def _dense_ms(x: Any) -> float:
    import torch
    from torch.nn.attention import SDPBackend

    from eval.bench.attention import _sdpa

    q, k, v = (t.detach().transpose(0, 1)[None].contiguous() for t in (x.q, x.k, x.v))
    with torch.no_grad():
        run = _sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)
        first = _timed(run)[1]  # with what cuDNN prepares, a tenth of a second
        return first if first > 10 * LONG_MS else _ms(run)


def _ms(run: Any) -> float:
    """Milliseconds, the median of five, or of one where it takes long. `run` has run before."""
    first = _timed(run)[1]
    return first if first > LONG_MS else sorted(_timed(run)[1] for _ in range(5))[2]


def _timed(run: Any) -> tuple[Any, float]:
    """Its result and the milliseconds it took on the device."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return result, float(start.elapsed_time(end))


def _checked(x: Any, ids: Any, out: Any) -> float:
    """Relative error of `out` on sampled queries against fp32 from the definition, over the blocks they chose.

    Raises CheckFailed: an error above that of bf16, or a choice that leaves out a better block.
    """
    import torch

    from eval.bench.check import SCORE_BITS, CheckFailed

    shape, generator = x.shape, torch.Generator().manual_seed(0)
    size, scale = shape.block_size, shape.head_dim**-0.5
    means = x.k.detach()[: shape.seq_len // size * size].float().unflatten(0, (-1, size)).mean(1)
    tokens = [shape.seq_len - 1, *torch.randint(shape.seq_len, (SAMPLES - 1,), generator=generator).tolist()]
    wrong, norm = 0.0, 0.0
    for token in tokens:
        head = int(torch.randint(shape.num_heads, (1,), generator=generator))
        key_head, own = head // (shape.num_heads // shape.num_kv_heads), token // size
        q = x.q.detach()[token, head].float()
        chosen = [block for block in ids[token, head].tolist() if block >= 0]
        if len(set(chosen)) != min(shape.topk - 1, own) or not all(0 <= block < own for block in chosen):
            raise CheckFailed(f"{shape}: token {token} chose {sorted(chosen)} of {own} past blocks")
        score = means[:own, key_head] @ q
        left = torch.ones(own, dtype=torch.bool)
        left[chosen] = False
        if chosen and bool(left.any()):
            gap = float(score[left.to(score.device)].max() - score[chosen].min())
            if gap > float(score.abs().max()) * 2.0**-SCORE_BITS:
                raise CheckFailed(f"{shape}: token {token} left out a block that scores {gap:.1e} higher")
        spans = [torch.arange(b * size, b * size + size) for b in chosen] + [torch.arange(own * size, token + 1)]
        index = torch.cat(spans).to(q.device)
        k, v = x.k.detach()[index, key_head].float(), x.v.detach()[index, key_head].float()
        exact = torch.softmax(k @ q * scale, 0) @ v
        wrong += float((out[token, head].float() - exact).norm()) ** 2
        norm += float(exact.norm()) ** 2
    error = math.sqrt(wrong / norm)
    if not error < ERROR:
        raise CheckFailed(f"{shape}: relative error {error:.1e} on sampled queries")
    return error


def growth(lengths: list[int], times: list[float]) -> float:
    """Exponent of time ~ length^exponent: the slope of a straight line through the logarithms."""
    if len(lengths) < 2:
        raise UserError("an exponent needs two lengths")
    x, y = [math.log(n) for n in lengths], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
