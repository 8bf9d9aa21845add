"""Prompts and decoding over a sequence-parallel group: every rank keeps the keys and values of its own heads.

In prefill a part of the prompts is one row of tokens, cut into equal columns: each rank runs its columns through
norms, projections and MLP, and around attention an all-to-all makes whole rows of its heads of them, as in
training (DeepSpeed-Ulysses, arXiv 2309.14509). The cache is thus cut by heads, which is what decoding needs: a
decoded token runs on all ranks, each attends with its heads, and the outputs are gathered.

Shape legend: R rows, S longest prompt, T tokens of a part, P ranks, H query heads, Hkv key heads, D head_dim, V
vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from conf.schema import ModelConfig
from model.schedule import LayerPlan
from model.sequence_parallel import SequenceParallel, kv_copies
from model.shapes import head_dim

if TYPE_CHECKING:
    from model.cache import KVCache
    from model.transformer import CausalLM


def check_parallel(config: ModelConfig, size: int) -> None:
    """Refuse a model that cannot be shared out over `size` ranks."""
    if config.num_heads % size:
        raise UserError(f"sequence_parallel={size} does not divide the model's {config.num_heads} query heads")
    if config.num_kv_heads % size and size % config.num_kv_heads:
        raise UserError(
            f"sequence_parallel={size}: the model's {config.num_kv_heads} kv heads cannot be shared out"
        )
    if config.key_conv:
        raise UserError("sequence_parallel: models with a key convolution run on one process only")


def cache_shape(config: ModelConfig, parallel: SequenceParallel | None) -> ModelConfig:
    """The model's shape as this rank's KV cache sees it: with its own kv heads only."""
    if parallel is None:
        return config
    return replace(config, num_kv_heads=max(1, config.num_kv_heads // parallel.size), head_dim=head_dim(config))


def own_heads(parallel: SequenceParallel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [R, H, D] and k, v [R, Hkv, D] of whole tokens: the heads of this rank, as `to_heads` deals them out."""
    copies = kv_copies(k.shape[1], parallel.size)
    rank, kv_rank = parallel.rank, parallel.rank // copies
    q_width, kv_width = q.shape[1] // parallel.size, max(1, k.shape[1] // parallel.size)
    kv = slice(kv_rank * kv_width, (kv_rank + 1) * kv_width)
    return q[:, rank * q_width : (rank + 1) * q_width], k[:, kv], v[:, kv]


def all_heads(parallel: SequenceParallel, out_RhD: Tensor) -> Tensor:
    """[R, H / P, D] of each rank's heads to [R, H, D] on all."""
    parts = [torch.empty_like(out_RhD, memory_format=torch.contiguous_format) for _ in range(parallel.size)]
    dist.all_gather(parts, out_RhD.contiguous(), group=parallel.group)
    return torch.cat(parts, dim=1)


def agree(parallel: SequenceParallel, token_R: Tensor, more: bool) -> tuple[Tensor, bool]:
    """The group's first rank decides: its tokens int64 [R], and whether there are more to come."""
    box = torch.cat([token_R, torch.tensor([int(more)], device=token_R.device)])
    dist.broadcast(box, src=dist.get_global_rank(parallel.group, 0), group=parallel.group)
    return box[:-1], bool(box[-1])


def all_say(parallel: SequenceParallel, yes: bool, device: torch.device) -> bool:
    """Whether every rank of the group says yes."""
    box = torch.tensor([int(yes)], device=device)
    dist.all_reduce(box, dist.ReduceOp.MIN, group=parallel.group)
    return bool(box)


@torch.no_grad()
def parallel_prefill(
    model: CausalLM, input_ids_RS: Tensor, cache: KVCache, plans: Sequence[LayerPlan], chunk: int
) -> Tensor:
    """As `CausalLM.prefill`, called by all ranks of the group with the same prompts: fp32 [R, V] on all.

    Raises:
        UserError: a key convolution, which would need its neighbours' keys.
    """
    parallel = model.execution.parallel
    assert parallel is not None
    check_parallel(model.config, parallel.size)
    device = input_ids_RS.device
    last_RC = torch.zeros(
        len(cache.lengths), model.config.hidden_size, dtype=next(model.parameters()).dtype, device=device
    )
    for part in cache.parts(chunk):
        cache.part = part  # also of prompts that are run at once
        tokens = torch.cat([input_ids_RS[row, a:b] for row, a, b in part])
        positions = torch.cat([torch.arange(a, b, device=device) for _, a, b in part])
        width = -(-tokens.numel() // parallel.size)
        missing = width * parallel.size - tokens.numel()  # so many zeros end the row; nobody attends to them
        mine = slice(parallel.rank * width, (parallel.rank + 1) * width)
        borders = [0, *accumulate(b - a for _, a, b in part)]
        hidden_1TC = model.model(
            torch.nn.functional.pad(tokens, (0, missing))[None, mine],
            positions=torch.nn.functional.pad(positions, (0, missing))[None, mine],
            cu_seqlens=torch.tensor(borders, dtype=torch.int32, device=device),
            max_seqlen=max(b - a for _, a, b in part),
            plans=plans,
            cache=cache,
        )
        for (row, _, b), border in zip(part, borders[1:], strict=True):
            if b == cache.lengths[row] and (border - 1) // width == parallel.rank:
                last_RC[row] = hidden_1TC[0, (border - 1) % width]
    cache.part = []
    cache.end_prefill()
    dist.all_reduce(last_RC, group=parallel.group)  # one rank has a row, the others zeros: exact
    return model.logits(last_RC).float()
