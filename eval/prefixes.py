"""Prompts that begin alike: what they share is run once, within a batch and from one batch to the next.

It pays where samples have one haystack and differ behind some point of it, as in a needle grid, and costs one more
row of cache.

Shape legend: R rows, S longest prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import KVCache, Prefix
from model.parallel_generation import all_say
from model.sequence_parallel import SequenceParallel

MIN_SHARED = 64  # fewer tokens are not worth a copy


@dataclass
class Prefixes:
    """The first prompt of the last batch, with its keys and values.

    Attributes:
        owner: what made them: keys under another attention plan are others.
    """

    owner: str = ""
    tokens: Tensor | None = None
    stored: Prefix | None = None

    def begin(self, cache: KVCache, ids_RS: Tensor, owner: str) -> None:
        """Before a prefill: tell `cache` what its prompts `ids_RS` (on the host) share with each other and with
        the last batch."""
        if owner != self.owner:
            self.clear()
            self.owner = owner
        lengths = cache.lengths
        shared = min(_common(ids_RS[:1].expand_as(ids_RS), ids_RS, min(lengths)), min(lengths) - 1)
        kept = 0
        if self.tokens is not None:
            width = min(self.tokens.numel(), lengths[0])
            kept = min(_common(self.tokens[None], ids_RS[:1], width), shared)
        if len(lengths) == 1:  # nobody to share with but the last batch
            shared = kept
        if shared >= MIN_SHARED:
            cache.begin_with(shared, self.stored, kept)

    def keep(self, cache: KVCache, ids_RS: Tensor, parallel: SequenceParallel | None = None) -> None:
        """After a prefill: remember its first prompt, if a row more fits beside the most memory used so far, on
        every rank of `parallel`."""
        held = sum(x.nbytes for x in (*self.stored.keys, *self.stored.values)) if self.stored else 0
        self.clear(self.owner)
        row = sum(x[0, : cache.lengths[0]].nbytes for x in (*cache.keys, *cache.values))
        fits = row <= held + _room(cache.keys[0].device)
        if parallel is not None:  # ranks that start from different places would wait for each other forever
            fits = all_say(parallel, fits, cache.keys[0].device)
        if not fits:
            return
        self.tokens, self.stored = ids_RS[0, : cache.lengths[0]].clone(), cache.prefix()

    def clear(self, owner: str = "") -> None:
        """Give the memory back."""
        self.owner, self.tokens, self.stored = owner, None, None


def _room(device: torch.device) -> float:
    """Bytes that were never in use, less what fragmentation may take."""
    if device.type != "cuda":
        return float("inf")
    total = torch.cuda.get_device_properties(device).total_memory
    return 0.95 * total - torch.cuda.max_memory_reserved(device)


def _common(a_RS: Tensor, b_RS: Tensor, width: int) -> int:
    """How many of the first `width` tokens are equal in all rows."""
    differs = (a_RS[:, :width] != b_RS[:, :width]).any(0)
    return int(differs.to(torch.uint8).argmax()) if bool(differs.any()) else width
