"""`moba bench attention rule=true`: where the union path beats the routed one, measured and stored.

Both paths attend to the same chosen blocks of the same inputs; the choice of blocks, which they share, is not
timed. Each is checked against exact samples first. Dense attention stands beside them for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bench.environment import environment
from eval.bench.shapes import Shape, parse_shape

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import BenchConfig
    from eval.bench.inputs import Inputs
    from model.moba.triton_rule import Row

# (block_size, topk): from a third of the causal pairs to nearly all
_SHORT = (
    *((2048, 2), (2048, 3), (1024, 3), (1024, 5), (1024, 7)),
    *((512, 5), (512, 8), (512, 12), (128, 16), (128, 32)),
)
_LONG = ((4096, 4), (4096, 6), (2048, 5), (2048, 8), (2048, 12), (512, 16), (512, 32))
GRID = tuple(
    Shape(seq_len, 32, 8, head_dim, block, topk)
    for head_dim in (128, 64)
    for seq_len, points in ((1 << 13, _SHORT), (1 << 15, _LONG))
    for block, topk in points
)
_PACKED_POINTS = ((512, 5), (512, 8), (512, 12), (2048, 3))
PACKED = tuple(Shape(1 << 15, 32, 8, 128, block, topk) for block, topk in _PACKED_POINTS)
_DOCUMENTS = 4  # of a packed row
_HEAD = (
    f"{'seq/heads/kv/dim/block/topk':28s} {'docs':>4} {'density':>7} {'routed f+b':>10} {'union f+b':>10} "
    f"{'dense f+b':>10} {'best':>7}"
)


def refresh(config: BenchConfig) -> Path:
    """Measure the grid (or `config.rows`), print it, write the rule. Returns the JSON's path.

    Raises:
        UserError: rows that make no sense.
        eval.bench.check.CheckFailed: one of the paths is wrong; nothing is written.
    """
    import torch

    from eval.files import write_json
    from model.moba.triton_rule import RULE_FILE, thresholds

    shapes: list[tuple[Shape, int]] = [(parse_shape(text), config.documents) for text in config.rows]
    if not shapes:
        shapes = [(s, 1) for s in GRID] + [(s, _DOCUMENTS) for s in PACKED]
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; forward and backward in ms, blocks given\n{_HEAD}", flush=True)
    dense: dict[tuple[int, int], float] = {}
    rows = [_row(shape, documents, config, dense) for shape, documents in shapes]
    path = Path(config.out) if config.out else RULE_FILE
    write_json(path, report(rows, name))
    for found in thresholds(rows):
        won = "at no measured density" if found.density is None else f"from density {found.density:.2f} on"
        kind = "packed documents of" if found.packed else "up to"
        print(f"union wins {won}: head_dim {found.head_dim}, {kind} {found.seq_len}, blocks of {found.block_size}")
    print(f"wrote {path}")
    return path


def report(rows: Sequence[Row], gpu: str) -> dict[str, Any]:
    """What the rule's file holds: origin, thresholds, and the measurements they come from."""
    from model.moba.triton_rule import thresholds

    return {
        "source": "measured",
        **environment(gpu),
        "union_from": [asdict(threshold) for threshold in thresholds(rows)],
        "rows": list(rows),
    }


def _row(shape: Shape, documents: int, config: BenchConfig, dense: dict[tuple[int, int], float]) -> Row:
    import torch
    from torch.nn.attention import SDPBackend

    from eval.bench.attention import _dense_inputs, _sdpa
    from eval.bench.check import check
    from eval.bench.inputs import make_inputs
    from eval.bench.timing import both_ms
    from model.moba import triton_op, triton_union_op
    from model.moba.triton_rule import density

    x = make_inputs(shape, documents, config.routing, dtype=torch.bfloat16)
    for path in ("routed", "union"):
        check(x, path=path)
    leaves = (x.q, x.k, x.v)
    routed, union = (
        both_ms(_attention(x, attend), leaves, x.dout) for attend in (triton_op.attend, triton_union_op.attend)
    )
    key = (shape.seq_len, shape.head_dim)
    if config.dense and documents == 1 and key not in dense:
        q, k, v, dout = _dense_inputs(x)
        dense[key] = both_ms(_sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION), (q, k, v), dout)
    theirs = dense.get(key) if documents == 1 else None
    share = density(shape.seq_len // documents, shape.block_size, shape.topk)
    best = "union" if union < routed else "routed"
    print(
        f"{shape!s:28s} {documents:4d} {share:7.3f} {routed:10.3f} {union:10.3f} "
        f"{f'{theirs:10.3f}' if theirs is not None else ' ' * 10} {best:>7}",
        flush=True,
    )
    return {
        "seq_len": shape.seq_len,
        "documents": documents,
        "head_dim": shape.head_dim,
        "block_size": shape.block_size,
        "topk": shape.topk,
        "density": share,
        "routed_ms": routed,
        "union_ms": union,
        "dense_ms": theirs,
    }


def _attention(x: Inputs, attend: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """One path on blocks that are chosen here, once."""
    from model.moba.blocks import build_block_table
    from model.moba.triton_gate import choose

    shape = x.shape
    table = build_block_table(x.cu_seqlens, shape.seq_len, shape.block_size)
    past = min(shape.topk - 1, table.max_past)
    table = replace(table, complete_past=past)
    ids = choose(x.q.detach(), x.k.detach(), table, past)
    return lambda: attend(x.q, x.k, x.v, ids, table, shape.head_dim**-0.5)
