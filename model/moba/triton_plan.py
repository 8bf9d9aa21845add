"""How much scratch memory the Triton path takes, and how work is cut so that it fits.

Partial results (one row of D per pair) dominate: 103 GB for 1M tokens, 32 heads and 12 past blocks. The work
is cut by key heads first, then by queries. A cut changes no bit of the result: rows of out and dq depend on
their own pairs only and are merged in slot order, and dk, dv are always summed over whole lists.

Shape legend: triton_common.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.moba import triton_common as common

MIN_BUDGET = 4 << 30
_LIST_BYTES = 16  # per pair: row id, pair number, lse and delta in list order
_KEPT_BYTES = 8  # per pair, of lists kept for the backward pass
_SORT_BYTES = 32  # per pair, while a list is built: keys twice, order, and what the sort takes
_MAX_PAIRS = 2**31 - 2**24  # positions are int32
_TOKEN_STEP = 128  # query chunks are multiples of this


@dataclass(frozen=True)
class Plan:
    """Key heads per pass, tokens per chunk of partials, and whether lists are kept for the backward pass."""

    heads: int
    tokens: int
    keep_lists: bool

    def head_ranges(self, num_kv_heads: int) -> list[range]:
        return [range(h, min(h + self.heads, num_kv_heads)) for h in range(0, num_kv_heads, self.heads)]

    def token_ranges(self, num_tokens: int) -> list[range]:
        return [range(t, min(t + self.tokens, num_tokens)) for t in range(0, num_tokens, self.tokens)]


def default_budget(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Scratch bytes: the larger of 4 GiB and a quarter of what dense attention holds at its peak.

    Dense attention holds q, out and both gradients, and k, v and both gradients.
    """
    dense = 4 * num_tokens * (num_heads + num_kv_heads) * head_dim * itemsize
    return max(MIN_BUDGET, dense // 4)


def make_plan(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, slots: int, itemsize: int, budget: int
) -> Plan:
    """The largest pieces that fit into `budget` bytes; where ids and lists fill it, pieces a sixteenth of those.

    Many tokens with many blocks each come to that: 10M tokens with 60 blocks have 12 GB of ids and lists. Smaller
    pieces would save little of it, and their number would set the time.

    Args:
        slots: K, past blocks per query and head. itemsize: bytes of one element of q.
    """
    pairs = num_tokens * (num_heads // num_kv_heads) * slots  # per key head
    if pairs == 0:
        return Plan(num_kv_heads, num_tokens, False)
    budget -= 4 * pairs * num_kv_heads  # the block ids themselves
    kept = _KEPT_BYTES * pairs * num_kv_heads
    keep = kept <= budget // 8
    budget -= kept if keep else 0
    part = head_dim * itemsize + 4
    pieces = 4 * num_tokens * head_dim  # at most, of dk and dv of lists that are cut (see triton_lists.Segments)
    per_head = pairs * max(_SORT_BYTES, _LIST_BYTES + part) + pieces
    heads = min(budget // per_head, _MAX_PAIRS // pairs, num_kv_heads)
    if heads >= 1:
        passes = common.ceil_div(num_kv_heads, heads)
        return Plan(common.ceil_div(num_kv_heads, passes), num_tokens, keep)
    per_token = (num_heads // num_kv_heads) * slots * part
    lists = pieces + _LIST_BYTES * pairs
    tokens = max(_TOKEN_STEP, lists // 16 // per_token, (budget - lists) // per_token)
    chunks = common.ceil_div(num_tokens, tokens)
    tokens = common.ceil_div(common.ceil_div(num_tokens, chunks), _TOKEN_STEP) * _TOKEN_STEP
    return Plan(1, min(tokens, num_tokens), keep)
