"""Greedy generation through the KV cache: one prefill, then one token per row and step.

The attention plans of the two phases are given separately. The MoBA paper prefills with MoBA and decodes
with full attention (section 3.4).

Shape legend: R rows, S longest prompt, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch

from eval.prefixes import Prefixes
from model.cache import KVCache
from model.decode_graph import Decoder
from model.parallel_generation import agree, cache_shape
from model.schedule import LayerPlan
from model.transformer import CausalLM


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    prefill_plans: Sequence[LayerPlan],
    decode_plans: Sequence[LayerPlan],
    chunk: int = 0,
    ended: Callable[[list[int]], bool] | None = None,
    prefixes: Prefixes | None = None,
    share: str = "",
) -> list[list[int]]:
    """The most likely continuation of every prompt, token by token.

    Args:
        prompts: token ids; lengths may differ, none may be empty.
        max_new_tokens: at most so many tokens per prompt.
        eos_id: a row ends with this token, or one of these, which is not returned. None: rows run to
            `max_new_tokens`.
        prefill_plans, decode_plans: one plan per layer for the prompt and for the tokens after it.
        chunk: prompt tokens of all rows run at a time, as in `CausalLM.prefill`; 0: all.
        ended: whether a row may end with the new tokens it has, such as after a stop string. All are returned.
            Under sequence parallelism all ranks call with the same prompts and plans; the first one's `ended`
            counts, and its result is the one to use.

        prefixes: with it, what prompts share is run once, within the batch and with the last one.
        share: what the prompts are run as, such as the name of their plans; keys are shared under one name only.
            Empty: nothing is shared, and nothing kept.

    Returns:
        New tokens of each prompt. Rows of a batch do not influence each other.

    Raises:
        ValueError: an empty prompt, or `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        return []
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    parameter = next(model.parameters())
    lengths = [len(prompt) for prompt in prompts]
    parallel = model.execution.parallel
    shape = cache_shape(model.config, parallel)
    cache = KVCache(shape, lengths, max_new_tokens, dtype=parameter.dtype, device=parameter.device)
    ids_RS = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_RS[row, : len(prompt)] = torch.tensor(prompt)

    sharing = prefixes is not None and bool(share) and not model.config.key_conv
    if prefixes is not None and sharing:
        prefixes.begin(cache, ids_RS, share)
    elif prefixes is not None:
        prefixes.clear()
    logits_RV = model.prefill(ids_RS.to(parameter.device), cache, prefill_plans, chunk)
    if prefixes is not None and sharing:
        prefixes.keep(cache, ids_RS, parallel)
    decode = Decoder(model, cache, decode_plans, max_new_tokens - 1)
    new_RS: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for step in range(max_new_tokens):
        token_R = logits_RV.argmax(-1)
        for row, token in enumerate(token_R.tolist()):
            if row in running:
                new_RS[row].append(token)
                if token in ends or (ended is not None and ended(new_RS[row])):
                    running.remove(row)
        more = bool(running) and step + 1 < max_new_tokens
        if parallel is not None:
            token_R, more = agree(parallel, token_R, more)
        if not more:
            break
        logits_RV = decode(token_R[:, None])
    return [list(takewhile(lambda token: token not in ends, row)) for row in new_RS]
