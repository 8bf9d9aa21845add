"""Self-attention of one block: QKV -> (key convolution) -> qk-norm -> RoPE -> (cache) -> backend -> output.

The layer's plan, given with every call, says whether the backend is full attention or MoBA; the weights
are the same. There are three entrances: packed rows (training and evaluation), prefill, decode.

Shape legend: R rows, S seq_len, T tokens (R * S in packed rows), C hidden_size, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from model.cache import KVCache
from model.decode import convolve_part, decode_attention, part_attention
from model.execution import PLAIN, Execution
from model.full import full_attention
from model.key_conv import KeyConv
from model.layers import RMSNorm
from model.moba import attend_blocks, moba_attention
from model.moba.choosers import choose
from model.parallel_generation import all_heads, own_heads
from model.products import Branches, Joint, Linear
from model.recompute import Choices
from model.schedule import LayerPlan
from model.shapes import head_dim

# Called as probe(layer, q_THD, k_THD, block_ids) by every MoBA layer; block_ids as in model.moba.choose_blocks.
Probe = Callable[[int, Tensor, Tensor, Tensor], None]


class Packed(NamedTuple):
    """What all layers share about the tokens: RoPE tables fp32 [T, D / 2], document borders, positions [T].

    Under sequence parallelism tables and positions are those of this rank's columns; `num_tokens` counts whole
    rows, as the borders do.
    """

    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    num_tokens: int


class Attention(nn.Module):
    """Grouped-query attention, with optional bias on q, k, v (Qwen2) and norm of q and k (Qwen3)."""

    def __init__(self, config: ModelConfig, layer: int, backend: str, execution: Execution = PLAIN) -> None:
        super().__init__()
        self.layer, self.backend = layer, backend
        self.parallel, self.pieces = execution.parallel, execution.pieces
        self.heads = config.num_heads, config.num_kv_heads
        self.head_dim = head_dim(config)
        q_out, kv_out = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, q_out, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_out, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_out, bias=config.qkv_bias)
        self.qkv = Branches(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = Linear(q_out, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps, execution) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps, execution) if config.qk_norm else None
        conv = config.key_conv
        self.key_conv = KeyConv(config.num_kv_heads, self.head_dim, conv) if conv else None
        # Nothing may stand between projection and RoPE.
        joint = execution.pieces.joint and not (config.qkv_bias or config.qk_norm or conv)
        self.qkv_proj = Joint(self.q_proj, self.k_proj, self.v_proj) if joint else None

    def forward(
        self,
        x: Tensor,
        *,
        packed: Packed,
        layer_plan: LayerPlan,
        cache: KVCache | None = None,
        probe: Probe | None = None,
        choices: Choices | None = None,
    ) -> Tensor:
        """x [..., C] whose leading dimensions flatten to T tokens; returns the same shape.

        With a cache, what its phase says is done: prefill stores keys and values and attends as without a
        cache; decode takes one token per row and attends to what is stored.

        Under sequence parallelism x holds this rank's columns, and `packed.cu_seqlens` the borders of whole rows.
        `choices` is given where the call may be computed again and must then attend to the same blocks.

        Training with selective checkpointing calls the three parts one by one instead.
        """
        q, k, v = self.lead(x, packed, cache)
        if cache is not None and cache.phase == "decode":
            cache.append(self.layer, k, v)
            out = decode_attention(q, cache, self.layer, layer_plan)
        elif cache is not None and cache.part:
            cache.store_part(self.layer, k, v)
            out = part_attention(q, cache, self.layer, layer_plan, self.backend)
        else:
            if cache is not None:
                cache.store_prompt(self.layer, k, v)
            out = self.attend(q, k, v, packed, layer_plan, probe, choices)
        return self.finish(out, x.shape, decoding=cache is not None and cache.phase == "decode")

    def lead(self, x: Tensor, packed: Packed, cache: KVCache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D] and k, v [T, Hkv, D]; under sequence parallelism of whole rows, for this rank's heads.

        Decoded tokens are whole on every rank.
        """
        q, k, v = self._qkv(x, packed, cache)
        if self.parallel is None:
            return q, k, v
        if cache is not None and cache.phase == "decode":
            return own_heads(self.parallel, q, k, v)
        return self.parallel.to_heads(q, k, v, rows=x.shape[0])

    def finish(self, out: Tensor, shape: torch.Size, decoding: bool = False) -> Tensor:
        """The output projection of what `attend` returned, in the shape of x."""
        if self.parallel is not None:
            out = all_heads(self.parallel, out) if decoding else self.parallel.to_sequence(out, rows=shape[0])
        return self.o_proj(out.reshape(*shape[:-1], -1))

    def _qkv(self, x: Tensor, packed: Packed, cache: KVCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D] and k, v [T, Hkv, D]; q and k normalised and rotated."""
        if self.qkv_proj is not None and self.qkv_proj.is_joined:
            return self.pieces.split_rope(self.qkv_proj(x), packed.cos, packed.sin, *self.heads)
        heads = (packed.cos.shape[0], -1, self.head_dim)
        q, k, v = (projected.view(heads) for projected in self.qkv(x))
        if self.key_conv is not None:
            k = self._convolve(self.key_conv, k, packed, cache)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return *self.pieces.rope(q, k, packed.cos, packed.sin), v

    def _convolve(self, conv: KeyConv, k: Tensor, packed: Packed, cache: KVCache | None) -> Tensor:
        """The key convolution; in decode, over the keys the cache remembers from before it."""
        if cache is not None and cache.phase == "decode":
            window_RWHD = cache.push_raw_key(self.layer, k)
            rows, width = window_RWHD.shape[:2]
            place = torch.arange(width, device=k.device).repeat(rows)
            mixed: Tensor = conv(window_RWHD.flatten(0, 1), place).view_as(window_RWHD)
            return mixed[:, -1]
        if cache is not None and cache.part:
            return convolve_part(conv, k, cache, self.layer)
        if cache is not None:
            cache.store_raw_keys(self.layer, k)
        out: Tensor = conv(k, packed.positions)
        return out

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        layer_plan: LayerPlan,
        probe: Probe | None = None,
        choices: Choices | None = None,
    ) -> Tensor:
        """Full attention or MoBA over whole documents, [T, H, D]."""
        if layer_plan.kind == "full":
            return full_attention(q, k, v, cu_seqlens=packed.cu_seqlens, max_seqlen=packed.max_seqlen)
        block_size, topk, cu_seqlens = layer_plan.block_size, layer_plan.topk, packed.cu_seqlens
        if probe is None and layer_plan.choose == "moba":
            return moba_attention(
                q,
                k,
                v,
                block_size=block_size,
                topk=topk,
                cu_seqlens=cu_seqlens,
                max_seqlen=packed.max_seqlen,
                backend=self.backend,
                remember=choices,
            )
        block_ids = choose(
            layer_plan.choose, q, k, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens, backend=self.backend
        )
        if probe is not None:
            probe(self.layer, q, k, block_ids)
        return attend_blocks(
            q, k, v, block_ids, block_size=block_size, cu_seqlens=cu_seqlens, backend=self.backend
        )
