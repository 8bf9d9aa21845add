"""What attention keeps for its backward pass and what it needs while it runs; see `model.memory` for the names."""

from __future__ import annotations

from dataclasses import dataclass

from model import full
from model.memory import Job
from model.schedule import LayerPlan
from model.shapes import head_dim

# Per (token, query head, past block), while lists are built: sorted keys, their order and the sort's own buffers.
_SORT_BYTES = 32


@dataclass(frozen=True)
class AttentionBytes:
    """Of one layer on one rank.

    Attributes:
        lse: log-sum-exp of every query.
        ids: chosen block ids as the kernels take them. packed_ids: as checkpointing keeps them.
        lists: of queries by block, where they are kept for backward.
        table: block geometry.
        forward, backward: workspace beside inputs, outputs and gradients.
    """

    lse: int
    ids: int = 0
    packed_ids: int = 0
    lists: int = 0
    table: int = 0
    forward: int = 0
    backward: int = 0


def attention_bytes(job: Job, plan: LayerPlan) -> AttentionBytes:
    """Bytes of one layer's attention; heads are shared out over the sequence-parallel group, tokens are not."""
    heads, kv_heads = job.heads_here
    tokens = job.tokens
    lse = 4 * heads * tokens
    past = 0 if plan.kind == "full" else min(plan.topk - 1, max(tokens - 1, 0) // plan.block_size)
    dense = plan.kind == "full" or plan.topk > max(tokens - 1, 0) // plan.block_size
    if dense and job.engine.deterministic and job.cuda and job.seq_len <= full.BLOCK * full.MOST_BLOCKS:
        past = (job.seq_len - 1) // full.BLOCK
        return _moba(job, LayerPlan("moba", full.BLOCK, past + 1), past, lse)
    if dense:
        # cuDNN's backward sums dq in fp32, keeps a number more per row, and has dk, dv of every query head first.
        wide, each = heads * tokens * head_dim(job.model), heads > kv_heads
        workspace = 4 * (wide + heads * tokens) + 2 * job.itemsize * wide * each if job.cuda else 0
        return AttentionBytes(lse, backward=workspace)
    return _moba(job, plan, past, lse)


def _moba(job: Job, plan: LayerPlan, past: int, lse: int) -> AttentionBytes:
    from model.moba.triton_plan import default_budget, make_plan

    heads, kv_heads = job.heads_here
    tokens, dim, size = job.tokens, head_dim(job.model), job.itemsize
    budget = default_budget(tokens, heads, kv_heads, dim, size)
    cut = make_plan(tokens, heads, kv_heads, dim, past, size, budget)
    pairs = tokens * heads * past
    at_once = tokens * (heads // kv_heads) * past * cut.heads  # pairs of one pass
    partials = min(cut.tokens, tokens) * (heads // kv_heads) * past * cut.heads * (dim * size + 4)
    blocks = tokens // plan.block_size + job.rows
    narrow = 1 if blocks <= 255 else 2 if blocks <= 2**15 else 4
    kept = 8 * pairs if cut.keep_lists else 0
    lists = 8 * at_once * (0 if kept else 1)
    sums = 2 * lse  # delta beside lse, by row
    return AttentionBytes(
        lse=lse,
        ids=4 * pairs,
        packed_ids=narrow * pairs,
        lists=kept,
        table=12 * tokens,
        forward=max(_SORT_BYTES * at_once, lists + partials),
        backward=sums + max(_SORT_BYTES * at_once * (0 if kept else 1), lists + 8 * at_once + partials),
    )
