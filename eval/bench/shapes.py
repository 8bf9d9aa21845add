"""What the attention benchmark measures: the official rows, and rows read from text."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import UserError


@dataclass(frozen=True)
class Shape:
    """One attention problem. Lengths in tokens; `topk` counts the query's own block."""

    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    topk: int

    def __str__(self) -> str:
        return "/".join(str(n) for n in vars(self).values())


# From 8 thousand to a million tokens, few large blocks and many small ones; heads of an 8B model at dimension
# 128, of a 1B model at 64. From 512 thousand tokens on, a quarter of the heads: the share of one GPU of four.
OFFICIAL = (
    *(Shape(1 << 13, 32, 8, 128, block, topk) for block, topk in ((512, 3), (128, 8))),
    *(Shape(1 << 15, 32, 8, 128, block, topk) for block, topk in ((2048, 3), (512, 3), (128, 8))),
    *(Shape(1 << 17, 32, 8, 128, block, topk) for block, topk in ((4096, 12), (512, 8), (128, 8))),
    *(Shape(1 << 19, 8, 2, 128, block, topk) for block, topk in ((4096, 12), (512, 8))),
    *(Shape(1 << 20, 8, 2, 128, block, topk) for block, topk in ((4096, 12), (512, 8), (128, 8))),
    *(Shape(1 << 13, 32, 8, 64, block, topk) for block, topk in ((512, 3), (128, 8))),
    *(Shape(1 << 15, 32, 8, 64, block, topk) for block, topk in ((2048, 3), (512, 3), (128, 8))),
    *(Shape(1 << 17, 32, 8, 64, block, topk) for block, topk in ((4096, 12), (512, 8), (128, 8))),
)


@dataclass(frozen=True)
class Case:
    """A shape and how its tokens are packed and routed (see `eval.bench.inputs`)."""

    shape: Shape
    documents: int = 1
    routing: str = "uniform"


# Beside the official shapes with one document and uniform routing.
_OTHER = (
    *(
        (1 << 15, block, topk, 1, routing)
        for block, topk in ((512, 3), (128, 8))
        for routing in ("clustered", "sink")
    ),
    *((1 << 17, 512, 8, 1, routing) for routing in ("clustered", "sink")),
    *((1 << 17, block, topk, 13, "uniform") for block, topk in ((512, 8), (4096, 12))),
)
CASES = (
    *(Case(shape) for shape in OFFICIAL),
    *(
        Case(Shape(length, 32, 8, 128, block, topk), docs, routing)
        for length, block, topk, docs, routing in _OTHER
    ),
)


def parse_shape(text: str) -> Shape:
    """`seq_len/num_heads/num_kv_heads/head_dim/block_size/topk`, e.g. 32768/32/8/128/512/3."""
    parts = text.split("/")
    if len(parts) != 6 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(
            f"rows: '{text}' is not seq_len/num_heads/num_kv_heads/head_dim/block_size/topk (32768/32/8/128/512/3)"
        )
    shape = Shape(*map(int, parts))
    if shape.num_heads % shape.num_kv_heads:
        raise UserError(f"rows: '{text}': {shape.num_heads} query heads are no multiple of {shape.num_kv_heads}")
    return shape
