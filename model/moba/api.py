"""The public face of MoBA: check the inputs, pick a backend, choose blocks, attend to them.

Shape legend: T tokens, N documents, H query heads, Hkv key heads, D head dimension, K listed past blocks.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from conf.errors import UserError
from model.dispatch import Backend, resolve_backend
from model.full import full_attention
from model.moba.blocks import BlockTable, build_block_table

BLOCK_MULTIPLE = 16
Remember = Callable[[Callable[[], Tensor], int], Tensor]
_log = logging.getLogger(__name__)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    remember: Remember | None = None,
) -> Tensor:
    """Mixture of Block Attention (Lu et al. 2025, arXiv:2502.13189), causal, packed documents, grouped heads.

    Each query attends, per query head, to the `topk - 1` past blocks of its document with the highest
    `q . mean(k of block)` and, causally, to its own block, in one softmax. `topk` counts the own block:
    1 is attention within blocks, a `topk` of at least the number of blocks is full causal attention.
    No gradient flows through the choice.

    Args:
        q: [T, H, D] after RoPE; fp16, bf16, fp32 or float64.
        k, v: [T, Hkv, D], same dtype and device, H a multiple of Hkv.
        block_size: tokens per block, a multiple of 16; blocks start at document starts.
        topk: at least 1.
        cu_seqlens: int32 [N + 1] document borders from 0 to T, on the device of q; None: one document.
            The values are checked on the CPU only (reading them on a GPU would wait for it).
        max_seqlen: longest document, or any larger number; None: T. Slots that no query can fill are then left
            out, and where `topk` covers the longest document full attention runs (said once in the log). On a GPU
            its backward is not bit-equal from run to run; `torch.use_deterministic_algorithms(True)` keeps MoBA's
            own kernels, which are.
        softmax_scale: None: 1 / sqrt(D).
        backend: auto | reference | varlen | triton, see `model.dispatch`.
        remember: stands between the choice and its use: `remember(choose, num_blocks)` returns `choose()`, int32
            ids below `num_blocks` or -1, or what it returned at another time.

    Returns:
        [T, H, D] in the dtype of q; differentiable in q, k, v.

    Raises:
        UserError: inputs that do not fit together, or a backend that cannot do this.
    """
    cu_seqlens = _check(q, k, v, block_size, cu_seqlens)
    _check_topk(topk)
    chosen = _backend(backend, q, block_size)
    scale = _scale(q, softmax_scale)
    longest = _longest(max_seqlen, cu_seqlens, q.shape[0])
    most_past = (longest - 1) // block_size
    if topk > most_past and _runs_full(chosen, longest, cu_seqlens, q.shape[0]):
        _say_full(block_size, topk)
        return full_attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=longest, softmax_scale=scale)
    past = min(topk - 1, most_past)
    table = dataclasses.replace(build_block_table(cu_seqlens, q.shape[0], block_size), complete_past=past)

    def pick() -> Tensor:
        return chosen.choose(q.detach(), k.detach(), table, past)

    block_ids = pick() if remember is None else remember(pick, table.block_start.numel())
    return chosen.attend(q, k, v, block_ids, table, scale)


def choose_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The past blocks each query attends to, per query head.

    Arguments and errors as in `moba_attention`.

    Returns:
        int32 [T, H, K], K = topk - 1 but never more than the past blocks a query of T tokens can have.
        Global block ids (documents in order, each document's blocks in order), -1 = none, in no promised
        order. The own block is implied and never listed.
    """
    cu_seqlens = _check(q, k, k, block_size, cu_seqlens)
    _check_topk(topk)
    table = build_block_table(cu_seqlens, q.shape[0], block_size)
    return _backend(backend, q, block_size).choose(q.detach(), k.detach(), table, _num_past(topk, table))


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over given past blocks and, causally, each query's own block; the chooser may be any.

    Args:
        block_ids: int32 [T, H, K], distinct global ids of past blocks of the query's own document, -1 = none.
            The values are checked on the CPU only.

    The rest, the result and the errors are as in `moba_attention`.
    """
    cu_seqlens = _check(q, k, v, block_size, cu_seqlens)
    table = build_block_table(cu_seqlens, q.shape[0], block_size)
    _check_block_ids(block_ids, q, table)
    chosen = _backend(backend, q, block_size)
    return chosen.attend(q, k, v, block_ids, table, _scale(q, softmax_scale))


def _check(q: Tensor, k: Tensor, v: Tensor, block_size: int, cu_seqlens: Tensor | None) -> Tensor:
    """Refuse what does not fit together; returns the document borders."""
    if q.dim() != 3 or k.dim() != 3:
        raise UserError(
            f"q {_dims(q)}, k {_dims(k)}: expected q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim]"
        )
    if k.shape != v.shape:
        raise UserError(f"k {_dims(k)}, v {_dims(v)}: their shapes must be equal")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or 0 in (*q.shape, *k.shape):
        raise UserError(f"q {_dims(q)}, k {_dims(k)}: need the same tokens and head_dim, none of them 0")
    if q.shape[1] % k.shape[1]:
        raise UserError(
            f"{q.shape[1]} query heads, {k.shape[1]} kv heads: the first must be a multiple of the second"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise UserError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: need one dtype of float16, bfloat16, float32, float64"
        )
    if not q.device == k.device == v.device:
        raise UserError(f"q on {q.device}, k on {k.device}, v on {v.device}: need one device")
    if not isinstance(block_size, int) or block_size < 1 or block_size % BLOCK_MULTIPLE:
        up = max(1, math.ceil(block_size / BLOCK_MULTIPLE)) * BLOCK_MULTIPLE
        raise UserError(f"block_size={block_size}: must be a positive multiple of {BLOCK_MULTIPLE}, such as {up}")
    if cu_seqlens is None:
        return torch.arange(0, 2 * q.shape[0], q.shape[0], dtype=torch.int32, device=q.device)
    _check_borders(cu_seqlens, q)
    return cu_seqlens


def _check_borders(cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise UserError(f"cu_seqlens {cu_seqlens.dtype} {_dims(cu_seqlens)}: must be int32 [documents + 1]")
    if cu_seqlens.device != q.device:
        raise UserError(f"cu_seqlens on {cu_seqlens.device}, q on {q.device}: need one device")
    if cu_seqlens.device.type == "cpu" and (
        cu_seqlens[0] != 0 or cu_seqlens[-1] != q.shape[0] or bool((cu_seqlens.diff() < 0).any())
    ):
        raise UserError(f"cu_seqlens: must rise from 0 to the number of tokens, {q.shape[0]}")


def _check_topk(topk: int) -> None:
    if not isinstance(topk, int) or topk < 1:
        raise UserError(f"topk={topk}: must be an integer of at least 1 (it counts the query's own block)")


def _check_block_ids(block_ids: Tensor, q: Tensor, table: BlockTable) -> None:
    if block_ids.dtype != torch.int32 or block_ids.dim() != 3 or block_ids.shape[:2] != q.shape[:2]:
        raise UserError(
            f"block_ids {block_ids.dtype} {_dims(block_ids)}: need int32 [{q.shape[0]}, {q.shape[1]}, past blocks]"
        )
    if block_ids.device != q.device:
        raise UserError(f"block_ids on {block_ids.device}, q on {q.device}: need one device")
    if block_ids.device.type == "cpu" and block_ids.shape[2]:
        past = (block_ids >= table.first_block[:, None, None]) & (block_ids < table.own_block[:, None, None])
        ordered = block_ids.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if not bool((past | (block_ids == -1)).all()) or bool(twice.any()):
            raise UserError("block_ids: must be distinct past blocks of the query's document, or -1")


def _longest(max_seqlen: int | None, cu_seqlens: Tensor, tokens: int) -> int:
    """Bound on the tokens of a document."""
    if max_seqlen is None:
        return tokens
    documents = cu_seqlens.numel() - 1
    longest = max_seqlen if cu_seqlens.device.type != "cpu" else int(cu_seqlens.diff().max())
    if max_seqlen < longest or max_seqlen * documents < tokens:
        raise UserError(f"max_seqlen={max_seqlen}: there is a longer document among the {documents}")
    return min(max_seqlen, tokens)


def _runs_full(chosen: Backend, longest: int, cu_seqlens: Tensor, tokens: int) -> bool:
    """Whether full attention is the better way to the same result when every past block is chosen."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    documents = cu_seqlens.numel() - 1
    ragged = documents > 1 and documents * longest != tokens
    return chosen.full_when_dense and (chosen.full_when_ragged or not ragged)


@cache
def _say_full(block_size: int, topk: int) -> None:
    what = "MoBA with block_size %d and topk %d covers whole documents: full attention runs, with the same result"
    _log.info(what, block_size, topk)


def _backend(name: str, q: Tensor, block_size: int) -> Backend:
    return resolve_backend(name, device=q.device, dtype=q.dtype, head_dim=q.shape[2], block_size=block_size)


def _num_past(topk: int, table: BlockTable) -> int:
    return min(topk - 1, table.max_past)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)


def _dims(x: Tensor) -> str:
    return str(list(x.shape))
