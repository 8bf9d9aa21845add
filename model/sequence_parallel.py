"""Sequence parallelism by exchange (DeepSpeed-Ulysses, arXiv 2309.14509): around attention, shards of the sequence
become shards of the heads and back.

Every rank of a group holds the same columns of all rows, S / P tokens each, through norms, projections and loss.
Around attention an all-to-all turns [R * S / P, H, D] into [R * S, H / P, D] and back, so each rank attends over
whole documents for its heads: full attention, MoBA's gate and its block numbers are exactly those of one process.
Where there are fewer KV heads than ranks each is sent to the P / Hkv ranks whose query heads read it; their
gradients add up on the way back.

Shape legend: R rows, S seq_len of the whole rows, P ranks of the group, H query heads, Hkv kv heads, D head_dim,
T = R * S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def kv_copies(num_kv_heads: int, size: int) -> int:
    """How many ranks hold each kv head; 1 where every rank has kv heads of its own.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(f"{num_kv_heads} kv heads over {size} ranks: one must be a multiple of the other")
    return max(1, size // num_kv_heads)


def bytes_per_layer(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int, size: int, passes: int = 2
) -> int:
    """Bytes each rank sends to others for one layer: q, k, v one way and the output back, in every pass.

    Args:
        num_tokens: of the whole micro-batch, R * S.
        size: ranks of the group, P.
        passes: 2 for forward and backward, 3 if the forward is computed again (activation checkpointing).
    """
    heads = 2 * num_heads + 2 * num_kv_heads * kv_copies(num_kv_heads, size)
    return passes * (num_tokens // size) * heads * head_dim * itemsize * (size - 1) // size


class SequenceParallel:
    """One group, seen from this rank. Given to the model; nothing here is global.

    Attributes:
        size, rank: ranks of the group, and this one's place, which is also its place in the sequence.
        bytes_sent: what this rank sent to the others so far, by counting.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.bytes_sent = 0

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shards of the sequence to shards of the heads.

        Args:
            q: [T / P, H, D]; k, v: [T / P, Hkv, D]; this rank's columns of `rows` rows.

        Returns:
            q [T, H / P, D]; k, v [T, max(Hkv / P, 1), D]; whole rows, the heads of this rank's place.
        """
        if q.shape[1] % self.size:
            raise ValueError(f"{q.shape[1]} query heads over {self.size} ranks: must be a multiple")
        copies = kv_copies(k.shape[1], self.size)
        if copies > 1:  # the backward of expand adds the copies' gradients
            k, v = (x[:, :, None].expand(-1, -1, copies, -1).flatten(1, 2) for x in (k, v))
        q, k, v = _Exchange.apply(self, rows, True, q, k, v)
        return q, k, v

    def to_sequence(self, out: Tensor, rows: int) -> Tensor:
        """[T, H / P, D] of whole rows to [T / P, H, D] of this rank's columns."""
        (back,) = _Exchange.apply(self, rows, False, out)
        return back

    def gather_columns(self, x_RS: Tensor) -> Tensor:
        """[R, S / P] of each rank to [R, S] on all. No gradient."""
        parts = [torch.empty_like(x_RS, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x_RS.detach().contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def exchange(self, tensors: tuple[Tensor, ...], rows: int, to_heads: bool) -> tuple[Tensor, ...]:
        """The all-to-alls of several tensors, each packed while the one before it is on its way."""
        sent, arrived, works = [], [], []
        for x in tensors:
            send = _split_heads(x, rows, self.size) if to_heads else _split_columns(x, rows, self.size)
            receive = torch.empty_like(send)
            works.append(dist.all_to_all_single(receive, send, group=self.group, async_op=True))
            sent.append(send)  # must live until its exchange is over
            arrived.append(receive)
            self.bytes_sent += send.numel() * send.element_size() * (self.size - 1) // self.size
        for work in works:
            work.wait()
        return tuple(_join_columns(x) if to_heads else _join_heads(x) for x in arrived)


class _Exchange(torch.autograd.Function):
    """Its own inverse is its gradient; nothing is saved."""

    @staticmethod
    def forward(
        ctx: Any, parallel: SequenceParallel, rows: int, to_heads: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parallel, ctx.rows, ctx.to_heads = parallel, rows, to_heads
        return parallel.exchange(tensors, rows, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.parallel.exchange(grads, ctx.rows, not ctx.to_heads)


def _split_heads(x: Tensor, rows: int, size: int) -> Tensor:
    """[R * s, H, D] to [P, R, s, H / P, D], contiguous: one part for each rank's heads."""
    return x.view(rows, -1, size, x.shape[1] // size, x.shape[2]).permute(2, 0, 1, 3, 4).contiguous()


def _join_heads(x: Tensor) -> Tensor:
    """[P, R, s, H / P, D] to [R * s, H, D]."""
    return x.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)


def _split_columns(x: Tensor, rows: int, size: int) -> Tensor:
    """[R * S, h, D] to [P, R, S / P, h, D], contiguous: one part for each rank's columns."""
    return x.unflatten(0, (rows, size, -1)).transpose(0, 1).contiguous()


def _join_columns(x: Tensor) -> Tensor:
    """[P, R, S / P, h, D] to [R * S, h, D]; no copy for a single row."""
    return x.transpose(0, 1).flatten(0, 2)
