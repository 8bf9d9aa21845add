"""One residual block, and how much of it training keeps for backward.

Shape legend: C hidden_size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from model import recompute
from model.attention import Attention, Packed, Probe
from model.cache import KVCache
from model.execution import Execution
from model.layers import MLP, ResidualNorm
from model.offload import HostOffload
from model.schedule import LayerPlan


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, layer: int, backend: str, execution: Execution) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, backend, execution)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, execution)
        self.input_layernorm = ResidualNorm(config.hidden_size, config.norm_eps, execution)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, config.norm_eps, execution)
        self.checkpointing = execution.checkpointing

    def forward(
        self,
        x: Tensor,
        more: Tensor | None = None,
        *,
        packed: Packed,
        layer_plan: LayerPlan,
        cache: KVCache | None = None,
        probe: Probe | None = None,
        offload: HostOffload | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream [..., C], and what the next norm has to add to it if that is still to be done.

        In training, keeps as much as `Execution.checkpointing` says.
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._parts(x, more, packed=packed, layer_plan=layer_plan, cache=cache, probe=probe)
        if cache is not None or probe is not None:
            raise ValueError("activation checkpointing takes neither a KV cache nor a probe: use torch.no_grad()")
        if self.checkpointing == "full":
            choices = recompute.Choices()
            whole = partial(self._whole, packed=packed, layer_plan=layer_plan, choices=choices)
            return recompute.full(whole, x, choices, offload), None
        out = recompute.selective(
            lambda x: self.self_attn.lead(self.input_layernorm(x)[1], packed),
            lambda q, k, v: self.self_attn.attend(q, k, v, packed, layer_plan),
            lambda x, out: self._rest(x, self.self_attn.finish(out, x.shape)),
            x,
            block_bound(packed, layer_plan),
            offload,
        )
        return out, None

    def _parts(self, x: Tensor, more: Tensor | None, **attention: Any) -> tuple[Tensor, Tensor]:
        x, normed = self.input_layernorm(x) if more is None else self.input_layernorm(x, more)
        x, normed = self.post_attention_layernorm(x, self.self_attn(normed, **attention))
        return x, self.mlp(normed)

    def _whole(self, x: Tensor, **attention: Any) -> Tensor:
        x, more = self._parts(x, None, **attention)
        return x + more

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x, normed = self.post_attention_layernorm(x, attended)
        out: Tensor = x + self.mlp(normed)
        return out


def block_bound(packed: Packed, layer_plan: LayerPlan) -> int:
    """More than any block id of the layer; 0 where it has no blocks."""
    if layer_plan.kind == "full":
        return 0
    return packed.num_tokens // layer_plan.block_size + packed.cu_seqlens.numel() - 1
