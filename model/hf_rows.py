"""Where the tokens of a batch of transformers are: padding, packed documents, keys of a cache.

transformers tells an attention function this in pieces: a padding mask, `position_ids`, the length of the cache.
`RowLayout` puts them together once per forward pass, on the host, and refuses what does not fit together.

Shape legend: B rows of the batch, Q query columns, N key columns (Q of them new), T real tokens laid end to end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.errors import UserError


@dataclass(frozen=True)
class RowLayout:
    """Real tokens of a batch, laid end to end.

    Attributes:
        query_index, key_index: int64, columns of the flattened [B * Q] and [B * N] that hold them; None: all.
        query_lengths, key_lengths: tokens of each sequence; a sequence is a packed document if `cached` is False,
            else what a row holds. Without a cache both are the same.
        cu_seqlens: int32 borders of `key_lengths`, on the device.
        cached: there are keys of earlier forward passes.
    """

    query_index: Tensor | None
    key_index: Tensor | None
    query_lengths: list[int]
    key_lengths: list[int]
    cu_seqlens: Tensor
    cached: bool


def lay_out(real_BN: Tensor | None, position_ids: Tensor, num_keys: int, cu_seqlens: Tensor | None) -> RowLayout:
    """The layout of one forward pass. Waits for the device once.

    Args:
        real_BN: bool [B, N], False for padding; None: no padding.
        position_ids: int64 [B, Q].
        num_keys: N; the last Q of them are the queries.
        cu_seqlens: document borders if the caller gave them as well (`cu_seq_lens_k`); checked.

    Raises:
        UserError: padding inside a row, positions that neither count up nor restart at 0, packed documents behind
            a cache, borders that contradict `position_ids`.
    """
    (B, Q), N, device = position_ids.shape, num_keys, position_ids.device
    positions = position_ids.cpu()
    spans = _real_spans(real_BN, B, N)
    old = N - Q
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    queries, keys = [], []
    for row, (start, end) in enumerate(spans):
        first = max(start, old)  # first real query column
        if first >= end:
            continue
        queries.append(torch.arange(row * Q + first - old, row * Q + end - old))
        keys.append(torch.arange(row * N + start, row * N + end))
        place = positions[row, first - old : end - old]
        if old:
            _check_continued(place, end - start, end, row)
            query_lengths.append(end - first)
            key_lengths.append(end - start)
        else:
            query_lengths += _documents(place, row)
    key_lengths = key_lengths if old else query_lengths
    borders = torch.tensor([0, *itertools.accumulate(key_lengths)], dtype=torch.int32, device=device)
    if cu_seqlens is not None and (old or cu_seqlens.tolist() != borders.tolist()):
        raise UserError(
            f"cu_seq_lens_k={cu_seqlens.tolist()} is not what position_ids say ({borders.tolist()}): "
            "pass position_ids that restart at 0 with each document"
        )
    whole = all(span == (0, N) for span in spans)
    return RowLayout(
        query_index=None if whole else _index(queries, device),
        key_index=None if whole else _index(keys, device),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        cu_seqlens=borders,
        cached=old > 0,
    )


def _real_spans(real_BN: Tensor | None, num_rows: int, num_keys: int) -> list[tuple[int, int]]:
    """First real column of each row, and the one behind its last; padding may only stand around it."""
    if real_BN is None:
        return [(0, num_keys)] * num_rows
    if real_BN.shape != (num_rows, num_keys):
        raise UserError(
            f"attention_mask {list(real_BN.shape)} must cover {num_rows} rows of {num_keys} keys (cached included)"
        )
    real = real_BN.cpu().long()
    count = real.sum(1)
    start = real.argmax(1)
    end = num_keys - real.flip(1).argmax(1)
    spans = []
    for row, (tokens, a, b) in enumerate(zip(count.tolist(), start.tolist(), end.tolist(), strict=True)):
        if tokens == 0:
            spans.append((0, 0))
            continue
        if b - a != tokens:
            raise UserError(
                f"attention_mask of row {row} has padding between tokens: MoBA needs each row's tokens side by "
                "side (pad on the left for generation)"
            )
        spans.append((a, b))
    return spans


def _documents(place: Tensor, row: int) -> list[int]:
    """Lengths of the packed documents of one row: a document starts where positions restart at 0."""
    restart = (place.diff() != 1).nonzero()[:, 0] + 1
    if bool((place[restart] != 0).any()):
        raise UserError(
            f"position_ids of row {row} neither count up by one nor restart at 0: its documents are unknown"
        )
    return torch.diff(restart, prepend=torch.tensor([0]), append=torch.tensor([place.numel()])).tolist()


def _check_continued(place: Tensor, num_tokens: int, end: int, row: int) -> None:
    """Queries behind a cache continue one document: the positions must say so."""
    last = int(place[-1])
    if bool((place.diff() != 1).any()) or last not in (num_tokens - 1, end - 1):
        raise UserError(
            f"position_ids of row {row} end at {last} behind {num_tokens} tokens, cached ones included: packed "
            "documents cannot be continued from a KV cache; run them with use_cache=False, or one per row"
        )


def _index(pieces: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat(pieces).to(device) if pieces else torch.empty(0, dtype=torch.int64, device=device)
