"""Held-out, position-wise and trailing loss of one set of weights under one or several attention plans.

Trailing loss (MoBA paper, section 3.1) is the loss of the last N tokens of documents that reach the full
length; position-wise loss is the same in buckets of positions. Both therefore read only rows that are one
document piece of the full length; the held-out mean reads every valid token.

Sums stay on the device in float64 until the end. They add up over batches and over processes, so a parallel
evaluation gives the numbers of a single one: `sums.table` can be summed by an all-reduce as it is.

Shape legend: R rows, S seq_len, N document pieces of a batch, B position buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from conf.constants import IGNORE_INDEX
from data.batch import Batch
from eval.loss_report import Bucket, LossReport, estimate

if TYPE_CHECKING:
    from model.attention import Probe
    from model.schedule import LayerPlan
    from model.transformer import CausalLM

Plans = TypeVar("Plans", contravariant=True)

COLUMNS = 6  # per line of the table: loss, tokens, clusters, loss^2, loss * tokens, tokens^2 (of a cluster)
MEAN, TRAILING, FIRST_BUCKET = 0, 1, 2  # lines of the table


class TokenLosses(Protocol[Plans]):
    """What a model must offer: `CausalLM.token_losses`, fp32 [R, S], 0 where a label is ignored."""

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: Plans,
    ) -> Tensor: ...


@torch.no_grad()
def whole_row_losses(
    model: CausalLM,
    input_ids: Tensor,
    labels: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    plans: Sequence[LayerPlan],
    probe: Probe | None = None,
) -> Tensor:
    """`CausalLM.token_losses` of whole rows, fp32 [R, S], where ranks hold some columns each: each computes
    its own, all get all. Collective within the sequence-parallel group, if there is one.

    Raises:
        ValueError: S is not a multiple of the number of ranks.
    """
    parallel = model.execution.parallel
    if parallel is None:
        return model.token_losses(input_ids, labels, positions, cu_seqlens, max_seqlen, plans, probe)
    width, left = divmod(input_ids.shape[1], parallel.size)
    if left:
        raise ValueError(f"rows of {input_ids.shape[1]} tokens do not divide into {parallel.size} equal shards")
    mine = slice(parallel.rank * width, (parallel.rank + 1) * width)
    ids, labels, positions = (x[:, mine] for x in (input_ids, labels, positions))
    losses = model.token_losses(ids, labels, positions, cu_seqlens, max_seqlen, plans, probe)
    return parallel.gather_columns(losses)


def bucket_edges(seq_len: int, bucket: int, spacing: str = "linear") -> tuple[int, ...]:
    """Bucket borders 0 = e0 < e1 < ... = seq_len.

    `linear`: every `bucket` tokens, the last one shorter if need be. `log`: `bucket`, then doubling.
    """
    if bucket < 1:
        raise ValueError(f"bucket must be at least 1 token, got {bucket}")
    if spacing == "linear":
        return (*range(0, seq_len, bucket), seq_len)
    if spacing != "log":
        raise ValueError(f"spacing must be linear or log, got {spacing!r}")
    edges = [0]
    end = bucket
    while end < seq_len:
        edges.append(end)
        end *= 2
    return (*edges, seq_len)


@dataclass
class LossSums:
    """Sums behind a `LossReport`: `table` is float64 [2 + B, 6], all of it additive."""

    table: Tensor
    edges: tuple[int, ...]
    trailing: int

    @classmethod
    def zeros(cls, edges: Sequence[int], trailing: int, device: torch.device | str = "cpu") -> LossSums:
        lines = FIRST_BUCKET + len(edges) - 1
        return cls(torch.zeros(lines, COLUMNS, dtype=torch.float64, device=device), tuple(edges), trailing)

    def merge(self, other: LossSums) -> LossSums:
        """The sums of both: of two parts of a held-out set, or of two processes."""
        if (self.edges, self.trailing) != (other.edges, other.trailing):
            raise ValueError("only sums over the same buckets and the same trailing length can be merged")
        return LossSums(self.table + other.table.to(self.table.device), self.edges, self.trailing)

    def add(self, losses: Tensor, batch: Batch) -> None:
        """Add the token losses [R, S] of `batch` (both on the table's device). Never waits for the device."""
        valid = batch.labels != IGNORE_INDEX
        losses = torch.where(valid, losses, 0.0).double()
        tokens = valid.double()
        self.table[MEAN] += _moments(_per_document(losses, batch), _per_document(tokens, batch))
        seq_len = losses.shape[1]
        if seq_len != self.edges[-1]:
            return  # shorter rows cannot hold a full-length document
        full = (batch.positions[:, -1] == seq_len - 1).double()[:, None]
        losses, tokens = losses * full, tokens * full
        tail = slice(max(0, seq_len - self.trailing), seq_len)
        self.table[TRAILING] += _moments(losses[:, tail].sum(1), tokens[:, tail].sum(1))
        for line, (start, end) in enumerate(pairwise(self.edges), FIRST_BUCKET):
            self.table[line] += _moments(losses[:, start:end].sum(1), tokens[:, start:end].sum(1))

    def report(self) -> LossReport:
        """The means and errors. The one place that reads from the device."""
        lines = self.table.cpu()
        buckets = tuple(
            Bucket(start, end, estimate(line))
            for (start, end), line in zip(pairwise(self.edges), lines[FIRST_BUCKET:], strict=True)
        )
        trailing = min(self.trailing, self.edges[-1])
        return LossReport(estimate(lines[MEAN]), estimate(lines[TRAILING]), trailing, self.edges[-1], buckets)


def evaluate_loss(
    model: TokenLosses[Plans],
    batches: Iterable[Batch],
    plans: Plans,
    *,
    bucket: int,
    trailing: int,
    seq_len: int = 0,
    spacing: str = "linear",
    device: torch.device | str | None = None,
) -> LossReport:
    """Loss of `model` under `plans` over `batches`; see the module text for what is counted where.

    Args:
        bucket: tokens per position bucket (with `spacing="log"`: tokens of the first one).
        trailing: the last so many tokens of a full-length row.
        seq_len: what counts as full length; rows of another length only enter the held-out mean.
            0: the row length of the first batch.
        device: where batches are copied to; None: they stay where they are.

    Raises:
        ValueError: no batch and no `seq_len` to tell the buckets from.
    """
    sums = sum_losses(
        model,
        batches,
        {"": plans},
        bucket=bucket,
        trailing=trailing,
        seq_len=seq_len,
        spacing=spacing,
        device=device,
    )
    return sums[""].report()


@torch.no_grad()
def sum_losses(
    model: TokenLosses[Plans],
    batches: Iterable[Batch],
    plans: dict[str, Plans],
    *,
    bucket: int,
    trailing: int,
    seq_len: int = 0,
    spacing: str = "linear",
    device: torch.device | str | None = None,
) -> dict[str, LossSums]:
    """Sums for several plans of the same weights, each batch read once: by plan name.

    With two plans `a` and `b` (in that order) there is a third entry `b - a`: the paired difference, whose
    standard error is far smaller than that of either loss, because both see the same documents.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None and not seq_len:
        raise ValueError("no batch to evaluate and no seq_len to tell the buckets from")
    if first is not None:
        seq_len = seq_len or first.input_ids.shape[1]
        device = first.input_ids.device if device is None else torch.device(device)
        batches = chain([first], batches)
    edges = bucket_edges(seq_len, bucket, spacing)
    names = list(plans)
    pair = f"{names[1]} - {names[0]}" if len(names) == 2 else ""
    sums = {name: LossSums.zeros(edges, trailing, device or "cpu") for name in [*names, *filter(None, [pair])]}
    for batch in batches:
        batch = batch.to(torch.device(device or "cpu"))
        losses = {name: _token_losses(model, batch, plans[name]) for name in names}
        if pair:
            losses[pair] = losses[names[1]] - losses[names[0]]
        for name, loss in losses.items():
            sums[name].add(loss, batch)
    return sums


def _token_losses(model: TokenLosses[Plans], batch: Batch, plans: Plans) -> Tensor:
    return model.token_losses(
        batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens, batch.max_seqlen, plans
    )


def _per_document(values: Tensor, batch: Batch) -> Tensor:
    """Sums of `values` [R, S] over the document pieces of the batch: [N]."""
    flat = values.reshape(-1)
    lengths = batch.cu_seqlens.diff().long()
    owner = torch.repeat_interleave(lengths, output_size=flat.numel())
    return torch.zeros(lengths.numel(), dtype=values.dtype, device=values.device).index_add_(0, owner, flat)


def _moments(loss: Tensor, tokens: Tensor) -> Tensor:
    """A line of the table from the sums of each cluster: [clusters], [clusters] -> [6]."""
    seen = (tokens > 0).double()
    return torch.stack([loss, tokens, seen, loss * loss, loss * tokens, tokens * tokens]).sum(1)
