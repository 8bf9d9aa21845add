"""Keys and values of a batch of prompts and their continuations, with the block means that MoBA needs.

The phase is explicit: a cache is filled once by `prefill`, whole or part by part, then extended one token per row
by `decode`. Rows may have different lengths; lengths are known on the host, so nothing waits for the device.

Shape legend: R rows, L capacity in tokens, Hkv kv heads, D head_dim, N blocks, T prompt tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from conf.schema import ModelConfig
from model.shapes import head_dim

Part = list[tuple[int, int, int]]  # (row, first token, token behind the last) of prompts


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one row's first tokens, [n, Hkv, D] for each layer."""

    keys: list[Tensor]
    values: list[Tensor]


class KVCache:
    """Keys (after RoPE) and values of every layer, [R, L, Hkv, D] each.

    Args:
        config: shape of the model.
        prompt_lengths: tokens of each row's prompt, at least 1 each.
        max_new_tokens: decode steps there is room for.
        dtype, device: of keys and values.

    Attributes:
        phase: "prefill" until the prompts are stored, then "decode".
        lengths: tokens stored per row.
        part: what of the prompts is being run, if they are run in parts.
        done: tokens of each prompt that are stored, where prefill starts; see `begin_with`.
        shared: so many first tokens are the same in all prompts: they are run for the first row alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompt_lengths: Sequence[int],
        max_new_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if not prompt_lengths or min(prompt_lengths) < 1:
            raise ValueError(f"every row needs a prompt of at least one token, got lengths {list(prompt_lengths)}")
        self.phase: Literal["prefill", "decode"] = "prefill"
        self.lengths = [int(length) for length in prompt_lengths]
        self.part: Part = []
        self.done = [0] * len(self.lengths)
        self.shared = 0
        self.capacity = max(self.lengths) + max_new_tokens
        shape = (len(self.lengths), self.capacity, config.num_kv_heads, head_dim(config))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        # Key convolution: the last keys of each row before it, oldest first, zeros before the row's start.
        tail = (shape[0], max(config.key_conv - 1, 0), *shape[2:])
        self._raw_keys = [torch.zeros(tail, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._means: list[_BlockMeans | None] = [None] * config.num_layers
        self._lengths_R = torch.tensor(self.lengths, device=device)
        self._rows_R = torch.arange(len(self.lengths), device=device)

    @property
    def lengths_R(self) -> Tensor:
        """`lengths` on the device, int64 [R]; in decode, the position of the token being decoded."""
        return self._lengths_R

    def cu_seqlens(self) -> Tensor:
        """int32 [R + 1]: the prompts laid end to end, as prefill runs them."""
        ends = torch.cumsum(self._lengths_R, 0).to(torch.int32)
        return torch.cat([ends.new_zeros(1), ends])

    def store_prompt(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Prompts laid end to end, [T, Hkv, D]."""
        self.require("prefill")
        start = 0
        for row, length in enumerate(self.lengths):
            self.keys[layer][row, :length] = k_THD[start : start + length]
            self.values[layer][row, :length] = v_THD[start : start + length]
            start += length

    def parts(self, chunk: int) -> Iterator[Part]:
        """The prompts in parts of at most `chunk` tokens (at least one per row); 0 or enough for all: one part.

        Rows advance together, so a row that is done leaves its share to the others. What the prompts share comes
        first, once; what is stored already does not come.
        """
        self.require("prefill")
        if not any(self.done) and not self.shared and (not chunk or sum(self.lengths) <= chunk):
            yield [(row, 0, length) for row, length in enumerate(self.lengths)]
            return
        if self.shared > self.done[0]:
            first = self.done[0]
            yield from self._advance([self.shared] + [0] * (len(self.lengths) - 1), chunk)
            for stored in (*self.keys, *self.values):
                stored[1:, first : self.shared] = stored[:1, first : self.shared]
            self.done = [self.shared] * len(self.lengths)
        yield from self._advance(self.lengths, chunk)
        self.part, self.done, self.shared = [], [0] * len(self.lengths), 0

    def _advance(self, ends: Sequence[int], chunk: int) -> Iterator[Part]:
        """Parts up to `ends`, from what is done."""
        while pending := [row for row, end in enumerate(ends) if self.done[row] < end]:
            share = max(1, chunk // len(pending)) if chunk else max(ends)
            self.part = [(row, self.done[row], min(self.done[row] + share, ends[row])) for row in pending]
            yield self.part
            for row, _, end in self.part:
                self.done[row] = end

    def begin_with(self, shared: int, prefix: Prefix | None = None, kept: int = 0) -> None:
        """Before prefill: all prompts begin with the same `shared` tokens, `kept` of which `prefix` holds.

        Raises:
            ValueError: a prompt that would have nothing left to run, or a key convolution, whose past is not kept.
        """
        self.require("prefill")
        if not kept <= shared < min(self.lengths):
            raise ValueError(f"{shared} shared tokens, {kept} of them kept: prompts of {self.lengths} need more")
        if self._raw_keys[0].shape[1]:
            raise ValueError("prompts under a key convolution share nothing: its past is not kept")
        if prefix is not None:
            for stored, first in zip((*self.keys, *self.values), (*prefix.keys, *prefix.values), strict=True):
                stored[:, :kept] = first[:kept]
        self.done, self.shared = [kept] * len(self.lengths), shared

    def prefix(self) -> Prefix:
        """A copy of the first prompt's keys and values."""
        end = self.lengths[0]
        return Prefix([keys[0, :end].clone() for keys in self.keys], [v[0, :end].clone() for v in self.values])

    def store_part(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Keys and values of `part`, its rows laid end to end, [T, Hkv, D]."""
        self.require("prefill")
        start = 0
        for row, first, end in self.part:
            self.keys[layer][row, first:end] = k_THD[start : start + end - first]
            self.values[layer][row, first:end] = v_THD[start : start + end - first]
            start += end - first

    def extend_raw_keys(self, layer: int, k_THD: Tensor) -> list[Tensor]:
        """Keys of `part` before the key convolution, each row's behind its last ones, [W - 1 + n, Hkv, D],
        zeros before the row's start. The new ends are remembered."""
        self.require("prefill")
        tail = self._raw_keys[layer]
        lengths = [end - first for _, first, end in self.part]
        windows = [
            torch.cat([tail[row], keys.to(tail.dtype)])
            for (row, _, _), keys in zip(self.part, k_THD.split(lengths), strict=True)
        ]
        for (row, _, _), window in zip(self.part, windows, strict=True):
            tail[row] = window[window.shape[0] - tail.shape[1] :]
        return windows

    def store_raw_keys(self, layer: int, k_THD: Tensor) -> None:
        """Prompts' keys before the key convolution, laid end to end, [T, Hkv, D]: their ends are remembered."""
        self.require("prefill")
        tail, start = self._raw_keys[layer], 0
        for row, length in enumerate(self.lengths):
            kept = min(length, tail.shape[1])
            tail[row, tail.shape[1] - kept :] = k_THD[start + length - kept : start + length]
            start += length

    def push_raw_key(self, layer: int, k_RHD: Tensor) -> Tensor:
        """One more key per row before the convolution, [R, Hkv, D]; returns the last kernel_size of each row,
        [R, W, Hkv, D], oldest first."""
        self.require("decode")
        window = torch.cat([self._raw_keys[layer], k_RHD[:, None].to(self._raw_keys[layer].dtype)], dim=1)
        self._raw_keys[layer] = window[:, 1:]
        return window

    def end_prefill(self) -> None:
        """Every layer has stored its prompts: from here on the cache decodes."""
        self.require("prefill")
        self.phase = "decode"

    def append(self, layer: int, k_RHD: Tensor, v_RHD: Tensor) -> None:
        """One more token per row, [R, Hkv, D], behind what the row holds."""
        self.require_room()
        self.keys[layer][self._rows_R, self._lengths_R] = k_RHD
        self.values[layer][self._rows_R, self._lengths_R] = v_RHD

    def require_room(self) -> None:
        """Refuse a token more than there is room for."""
        self.require("decode")
        if max(self.lengths) >= self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens per row: allocate a larger max_new_tokens")

    def end_step_on_device(self) -> None:
        """Every layer has appended its token. What a captured graph repeats: `lengths_R` grows in place."""
        self.require("decode")
        self._lengths_R += 1

    def end_step_on_host(self) -> None:
        """After `end_step_on_device`: what a captured graph leaves out."""
        self.require("decode")
        self.lengths = [length + 1 for length in self.lengths]

    def block_means(self, layer: int, block_size: int) -> Tensor:
        """fp32 [R, N, Hkv, D]: means of the keys of the blocks that were complete before this step.

        N is the largest count of complete blocks over the rows; rows with fewer hold zeros behind theirs.
        Blocks are averaged once, when first asked for after they fill up.
        """
        means = self._means[layer]
        if means is None or means.block_size != block_size:
            means = _BlockMeans(self.keys[layer], block_size)
            self._means[layer] = means
        return means.up_to(self.keys[layer], [length // block_size for length in self.lengths])

    def require(self, phase: str) -> None:
        """Refuse a call that belongs to the other phase."""
        if self.phase != phase:
            raise ValueError(f"the cache is in its {self.phase} phase, this call belongs to {phase}")


class _BlockMeans:
    def __init__(self, keys_RLHD: Tensor, block_size: int) -> None:
        rows, capacity, *heads = keys_RLHD.shape
        self.block_size = block_size
        self.done = [0] * rows
        self.means = torch.zeros(
            rows, capacity // block_size, *heads, dtype=torch.float32, device=keys_RLHD.device
        )

    def up_to(self, keys_RLHD: Tensor, complete: list[int]) -> Tensor:
        for row, (done, now) in enumerate(zip(self.done, complete, strict=True)):
            if now > done:
                keys = keys_RLHD[row, done * self.block_size : now * self.block_size]
                blocks = keys.unflatten(0, (now - done, self.block_size))
                self.means[row, done:now] = blocks.mean(dim=1, dtype=torch.float32)
        self.done = list(complete)
        return self.means[:, : max(complete)]
