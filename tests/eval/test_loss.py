"""Losses by position against loops over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.constants import IGNORE_INDEX
from data.batch import Batch, cu_seqlens_of
from eval.loss import LossSums, bucket_edges, evaluate_loss, sum_losses

SEQ_LEN = 24


class Table:
    """A model whose loss for input token i under plan `scale` is scale * (table[i] + 0.01 * position)."""

    def __init__(self) -> None:
        self.table = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 8

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: float,
    ) -> Tensor:
        losses = (self.table[input_ids] + 0.01 * positions) * plans
        return torch.where(labels == IGNORE_INDEX, 0.0, losses)


def batch(rows: Sequence[Sequence[int]], seed: int, ignore: float = 0.1) -> Batch:
    """Rows of documents of the given lengths; a share of the labels is ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (len(rows), sum(rows[0])), generator=generator)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in rows])
    labels = torch.where(torch.rand(ids.shape, generator=generator) < ignore, IGNORE_INDEX, ids)
    borders, longest = cu_seqlens_of(positions)
    return Batch(ids, labels, torch.from_numpy(positions), torch.from_numpy(borders), longest)


BATCHES = [
    batch([[SEQ_LEN], [10, 14]], 1),
    batch([[24], [24]], 2),
    batch([[1, 23], [SEQ_LEN]], 3),
    batch([[8, 8, 8]], 4),
]


def naive(
    batches: Sequence[Batch], start: int, end: int, full_only: bool, scale: float = 1.0
) -> tuple[float | None, int, float | None]:
    """(mean, tokens, stderr) of positions start..end-1, token by token; clusters are document pieces."""
    model, clusters = Table(), []
    for item in batches:
        for row in range(item.input_ids.shape[0]):
            pieces: list[list[int]] = []
            for s in range(item.input_ids.shape[1]):
                if item.positions[row, s] == 0:
                    pieces.append([])
                pieces[-1].append(s)
            for piece in pieces:
                if full_only and len(piece) != SEQ_LEN:
                    continue
                losses = [
                    scale * (float(model.table[item.input_ids[row, s]]) + 0.01 * int(item.positions[row, s]))
                    for s in piece
                    if item.labels[row, s] != IGNORE_INDEX and start <= int(item.positions[row, s]) < end
                ]
                if losses:
                    clusters.append((sum(losses), len(losses)))
    tokens = sum(n for _, n in clusters)
    if not tokens:
        return None, 0, None
    mean = sum(loss for loss, _ in clusters) / tokens
    k = len(clusters)
    variance = sum((loss - mean * n) ** 2 for loss, n in clusters) * k / (k - 1) if k > 1 else None
    return mean, tokens, None if variance is None else variance**0.5 / tokens


def same(estimate: object, expected: tuple[float | None, int, float | None]) -> None:
    mean, tokens, stderr = expected
    assert estimate.tokens == tokens  # type: ignore[attr-defined]
    assert estimate.loss == pytest.approx(mean, rel=1e-6)  # type: ignore[attr-defined]
    assert estimate.stderr == pytest.approx(stderr, rel=1e-5, abs=1e-9)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bucket", [1, 5, 8, 24, 100])
def test_equals_a_loop_over_tokens(bucket: int) -> None:
    report = evaluate_loss(Table(), BATCHES, 1.0, bucket=bucket, trailing=7)
    same(report.heldout, naive(BATCHES, 0, SEQ_LEN, full_only=False))
    same(report.trailing, naive(BATCHES, SEQ_LEN - 7, SEQ_LEN, full_only=True))
    assert report.buckets[0].start == 0 and report.buckets[-1].end == SEQ_LEN
    for part in report.buckets:
        same(part.estimate, naive(BATCHES, part.start, part.end, full_only=True))


def test_only_full_length_documents_count_by_position() -> None:
    shorts = [BATCHES[3]]
    report = evaluate_loss(Table(), shorts, 1.0, bucket=8, trailing=4)
    assert report.heldout.tokens == shorts[0].num_valid > 0
    assert report.trailing == type(report.trailing)(None, 0, 0, None)
    assert all(part.estimate.tokens == 0 for part in report.buckets)


def test_documents_not_rows_are_counted() -> None:
    report = evaluate_loss(Table(), BATCHES, 1.0, bucket=8, trailing=4)
    pieces = sum(item.cu_seqlens.numel() - 1 for item in BATCHES)
    assert report.heldout.documents == pieces - _silent(BATCHES)
    assert report.trailing.documents == 4


def _silent(batches: Sequence[Batch]) -> int:
    """Document pieces without any label."""
    silent = 0
    for item in batches:
        flat, borders = item.labels.reshape(-1), item.cu_seqlens.tolist()
        silent += sum(bool((flat[a:b] == IGNORE_INDEX).all()) for a, b in pairwise(borders))
    return silent


def test_parts_add_up_to_the_whole() -> None:
    kinds = {"bucket": 5, "trailing": 7, "seq_len": SEQ_LEN}
    whole = sum_losses(Table(), BATCHES, {"a": 1.0}, **kinds)["a"]
    parts = [sum_losses(Table(), BATCHES[i::3], {"a": 1.0}, **kinds)["a"] for i in range(3)]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    assert torch.allclose(merged.table, whole.table, rtol=1e-12, atol=0)
    first, second = merged.report(), whole.report()
    assert first.trailing.loss == pytest.approx(second.trailing.loss, rel=1e-12)
    with pytest.raises(ValueError, match="same buckets"):
        whole.merge(LossSums.zeros((0, 5), 7))


def test_difference_of_two_plans_is_paired() -> None:
    sums = sum_losses(Table(), BATCHES, {"full": 1.0, "moba": 1.25}, bucket=8, trailing=4)
    assert list(sums) == ["full", "moba", "moba - full"]
    difference = sums["moba - full"].report()
    same(difference.heldout, naive(BATCHES, 0, SEQ_LEN, False, scale=0.25))
    alone = sums["moba"].report()
    assert difference.heldout.stderr is not None and alone.heldout.stderr is not None
    assert difference.heldout.stderr < 0.5 * alone.heldout.stderr


def test_edges() -> None:
    assert bucket_edges(10, 4) == (0, 4, 8, 10)
    assert bucket_edges(8, 4) == (0, 4, 8)
    assert bucket_edges(100, 16, "log") == (0, 16, 32, 64, 100)
    assert bucket_edges(64, 16, "log") == (0, 16, 32, 64)
    with pytest.raises(ValueError, match="at least 1"):
        bucket_edges(10, 0)
    with pytest.raises(ValueError, match="linear or log"):
        bucket_edges(10, 2, "square")


def test_needs_batches_or_a_length() -> None:
    with pytest.raises(ValueError, match="no batch"):
        evaluate_loss(Table(), [], 1.0, bucket=2, trailing=2)
    assert evaluate_loss(Table(), [], 1.0, bucket=2, trailing=2, seq_len=8).heldout.loss is None
