"""Attention over a KV cache, full or MoBA: of one new token per row, or of the next part of each prompt.

Full attention reads the whole cache; MoBA reads the token's own block and the `topk - 1` past blocks with the
highest q . mean(k), per query head (MoBA paper, arXiv 2502.13189, section 2.2).

Shape legend: R rows, H heads, G query heads per kv head, D head_dim, L cached tokens, N past blocks, K gathered
tokens.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import KVCache
from model.key_conv import KeyConv
from model.moba.choosers import by_position
from model.moba.suffix import row_kernel, suffix_attention
from model.schedule import LayerPlan


def decode_attention(q_RHD: Tensor, cache: KVCache, layer: int, layer_plan: LayerPlan) -> Tensor:
    """q [R, H, D] of the tokens just appended to `cache`; returns [R, H, D]."""
    q_RhGD = q_RHD.unflatten(1, (cache.keys[layer].shape[2], -1))
    if layer_plan.kind == "moba":
        past = max(length // layer_plan.block_size for length in cache.lengths)
        if past > layer_plan.topk - 1:  # otherwise every block is chosen: full attention, exactly
            return _moba(q_RhGD, cache, layer, layer_plan).flatten(1, 2)
    return _full(q_RhGD, cache, layer).flatten(1, 2)


def part_attention(
    q_THD: Tensor, cache: KVCache, layer: int, layer_plan: LayerPlan, backend: str = "auto"
) -> Tensor:
    """q [T, H, D] of the part of the prompts just stored, rows end to end; attends to all before it, [T, H, D].

    Args:
        q_THD: may hold more tokens than the part, as sequence parallelism makes them; they get zeros.
        backend: of MoBA layers, as in `model.dispatch`.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    lengths = [end - first for _, first, end in cache.part]
    if len(q_THD) > sum(lengths):
        missing = len(q_THD) - sum(lengths)
        out = part_attention(q_THD[:-missing], cache, layer, layer_plan, backend)
        return torch.cat([out, out.new_zeros(missing, *out.shape[1:])])
    by_row = row_kernel(q_THD, min(lengths), layer_plan, backend)
    if by_row is not None:  # reads the cache in place
        pieces = zip(cache.part, q_THD.split(lengths), strict=True)
        done = [by_row(q, keys[row, :end], values[row, :end]) for (row, _, end), q in pieces]
        return done[0] if len(done) == 1 else torch.cat(done)
    ends = [(row, end) for row, _, end in cache.part]
    if len(ends) == 1:  # no copy of a long prompt
        ((row, end),) = ends
        k_SHD, v_SHD = keys[row, :end], values[row, :end]
    else:
        k_SHD = torch.cat([keys[row, :end] for row, end in ends])
        v_SHD = torch.cat([values[row, :end] for row, end in ends])
    return suffix_attention(
        q_THD,
        k_SHD,
        v_SHD,
        query_lengths=lengths,
        key_lengths=[end for _, end in ends],
        layer_plan=layer_plan,
    )


def convolve_part(conv: KeyConv, k_THD: Tensor, cache: KVCache, layer: int) -> Tensor:
    """The key convolution of a part of the prompts, over the keys the cache remembers from before it."""
    before = conv.weight.shape[0] - 1
    mixed = []
    for window_SHD in cache.extend_raw_keys(layer, k_THD):
        place = torch.arange(window_SHD.shape[0], device=k_THD.device)
        mixed.append(conv(window_SHD, place)[before:])
    return torch.cat(mixed)


def _full(q_RhGD: Tensor, cache: KVCache, layer: int) -> Tensor:
    """On a GPU our kernels; elsewhere SDPA, where the G heads of a group stand in for query positions, so that
    keys and values are not expanded."""
    q_RHD, keys, values = q_RhGD.flatten(1, 2), cache.keys[layer], cache.values[layer]
    if runs_compiled(q_RHD, keys.shape[2]):
        from model import triton_decode

        return triton_decode.attend(q_RHD, keys, values, cache.lengths_R).view_as(q_RhGD)
    longest = max(cache.lengths) + 1
    k, v = (x[:, :longest].transpose(1, 2) for x in (keys, values))
    mask = torch.arange(longest, device=q_RhGD.device) <= cache.lengths_R[:, None]
    return F.scaled_dot_product_attention(q_RhGD, k, v, attn_mask=mask[:, None, None])


def runs_compiled(q_RHD: Tensor, num_kv_heads: int) -> bool:
    """Whether decoded tokens like these, of which only shape and type count, run on our kernels."""
    if q_RHD.device.type != "cuda" or find_spec("triton") is None:
        return False
    from model import triton_decode

    return triton_decode.refusal(q_RHD, num_kv_heads) is None


def _moba(q_RhGD: Tensor, cache: KVCache, layer: int, layer_plan: LayerPlan) -> Tensor:
    keys, values = cache.keys[layer], cache.values[layer]
    q_RHD, size = q_RhGD.flatten(1, 2), layer_plan.block_size
    if runs_compiled(q_RHD, keys.shape[2]):
        from model import triton_decode_blocks

        ids_RHK = _listed(q_RhGD, cache, layer, layer_plan)
        return triton_decode_blocks.attend(q_RHD, keys, values, cache.lengths_R, ids_RHK, size).view_as(q_RhGD)
    blocks, chosen = _choose(q_RhGD, cache, layer, layer_plan)  # [R, h, G, topk] each
    offsets = torch.arange(size, device=q_RhGD.device)
    rows = torch.arange(keys.shape[0], device=q_RhGD.device)[:, None, None]
    heads = torch.arange(keys.shape[2], device=q_RhGD.device)[None, :, None]
    out = torch.empty_like(q_RhGD)
    for group in range(q_RhGD.shape[2]):  # one query head per kv head at a time bounds the gathered copies
        tokens = (blocks[:, :, group, :, None] * size + offsets).flatten(2)
        seen = chosen[:, :, group].repeat_interleave(size, dim=-1)
        seen = seen & (tokens <= cache.lengths_R[:, None, None])
        tokens = tokens.clamp(max=cache.capacity - 1)
        k_RhKD, v_RhKD = keys[rows, tokens, heads], values[rows, tokens, heads]
        out[:, :, group] = F.scaled_dot_product_attention(
            q_RhGD[:, :, group, None], k_RhKD, v_RhKD, attn_mask=seen[:, :, None]
        )[:, :, 0]
    return out


def _listed(q_RhGD: Tensor, cache: KVCache, layer: int, layer_plan: LayerPlan) -> Tensor:
    """What `_choose` says, int32 [R, H, topk], -1 = none: by our kernels where they can."""
    from model import triton_decode_choice

    if layer_plan.choose == "moba":
        means = cache.block_means(layer, layer_plan.block_size)
        if means.shape[1] <= triton_decode_choice.MOST_BLOCKS:
            last_R, q_RHD = cache.lengths_R, q_RhGD.flatten(1, 2)
            return triton_decode_choice.choose(q_RHD, means, last_R, layer_plan.block_size, layer_plan.topk)
    blocks, chosen = _choose(q_RhGD, cache, layer, layer_plan)
    return torch.where(chosen, blocks, -1).int().flatten(1, 2)


def _choose(q_RhGD: Tensor, cache: KVCache, layer: int, layer_plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """Block numbers within the row, own block first, and which of them count; [R, h, G, topk] each."""
    own_R = cache.lengths_R // layer_plan.block_size
    if layer_plan.choose == "moba":
        past, real = _best_blocks(q_RhGD, cache, layer, layer_plan, own_R)
    else:
        num_heads = q_RhGD.shape[1] * q_RhGD.shape[2]
        ids = by_position(layer_plan.choose, own_R, torch.zeros_like(own_R), num_heads, layer_plan.topk - 1)
        past, real = ids.clamp(min=0).unflatten(1, q_RhGD.shape[1:3]), (ids >= 0).unflatten(1, q_RhGD.shape[1:3])
    own = own_R[:, None, None, None].expand(*past.shape[:3], 1)
    return torch.cat([own, past], -1), torch.cat([torch.ones_like(own, dtype=torch.bool), real], -1)


def _best_blocks(
    q_RhGD: Tensor, cache: KVCache, layer: int, layer_plan: LayerPlan, own_R: Tensor
) -> tuple[Tensor, Tensor]:
    """MoBA's gate: the topk - 1 best past blocks and which of them exist, [R, h, G, topk - 1] each."""
    means = cache.block_means(layer, layer_plan.block_size)
    scores = torch.einsum("rhgd,rnhd->rhgn", q_RhGD.float(), means)
    is_past = torch.arange(means.shape[1], device=means.device) < own_R[:, None]
    scores = scores.masked_fill(~is_past[:, None, None], float("-inf"))
    # Stable: of equal scores the lowest block wins, as in model.moba.
    order = scores.sort(dim=-1, descending=True, stable=True)
    past = order.indices[..., : layer_plan.topk - 1]
    return past, order.values[..., : layer_plan.topk - 1] > float("-inf")
