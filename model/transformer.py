"""The language model: a Llama-shaped decoder whose layers attend as the plan of each call says.

Modules and parameters carry the names of Hugging Face's Llama, so that import and export rename nothing.
The attention plan is an argument, not state: switching between full attention and MoBA changes no key.

Shape legend: R rows, S seq_len, T tokens, C hidden_size, V vocab_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig, RopeConfig
from model.attention import Packed, Probe
from model.block import Block
from model.cache import KVCache
from model.embedding import Embedding
from model.execution import PLAIN, Execution
from model.generation import decode_on_device, prefill
from model.layers import ResidualNorm
from model.loss import LMHead, LossSums, sum_losses
from model.offload import HostOffload
from model.parallel_generation import parallel_prefill
from model.rope import Rotary
from model.schedule import LayerPlan
from model.shapes import KEY_CONV, check_shapes, head_dim, parameter_shapes

Plans = Sequence[LayerPlan]


class Trunk(nn.Module):
    """Embedding, blocks, final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig, rope: RopeConfig, backend: str, execution: Execution) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, backend, execution) for layer in range(config.num_layers))
        self.norm = ResidualNorm(config.hidden_size, config.norm_eps, execution)
        self.offload = HostOffload() if execution.offload_checkpoints else None
        self.shards = execution.parallel.size if execution.parallel is not None else 1
        self.rotary = Rotary(rope, head_dim(config))

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: Plans,
        cache: KVCache | None = None,
        probe: Probe | None = None,
    ) -> Tensor:
        """int64 ids of any shape, positions of the same shape -> hidden states [..., C]."""
        if len(plans) != len(self.layers):
            raise ValueError(f"{len(plans)} plans for {len(self.layers)} layers")
        flat = positions.reshape(-1)
        packed = Packed(*self.rotary.tables(flat), cu_seqlens, max_seqlen, flat, flat.numel() * self.shards)
        x, more = self.embed_tokens(input_ids), None
        if self.offload is not None:
            self.offload.begin()
        for index, (layer, layer_plan) in enumerate(zip(self.layers, plans, strict=True), start=1):
            # The last layer's tensors are the first that backward wants: they need not go anywhere.
            offload = self.offload if index < len(self.layers) else None
            # By keyword: DeepSpeed's ZeRO-3 hooks warn about positional arguments that are not tensors.
            given = (x,) if more is None else (x, more)
            x, more = layer(
                *given, packed=packed, layer_plan=layer_plan, cache=cache, probe=probe, offload=offload
            )
        normed: Tensor = (self.norm(x) if more is None else self.norm(x, more))[1]
        return normed


def drawn_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Fresh weights by name, fp32 on the CPU, one at a time. Each tensor has its own random stream.

    The stream is keyed by seed and name, so the values depend on neither the device, nor the order, nor the number
    of processes. Matrices are normal with `init_std`; those that write to the residual stream are divided by
    sqrt(2 * num_layers) (GPT-2, section 2.3). Norm weights are 1, biases 0.
    """
    for name, shape in parameter_shapes(config).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif name.endswith((".bias", KEY_CONV)):  # at zero, the convolution changes nothing
            yield name, torch.zeros(shape)
        else:
            std = config.init_std
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * config.num_layers) ** 0.5
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            yield name, torch.empty(shape).normal_(0.0, std, generator=stream)


class CausalLM(nn.Module):
    """Decoder with output head and loss.

    Args:
        config: shape. May be built under `torch.device("meta")`; then `to_empty` and load or `init_weights`.
        rope: of the current stage; not part of the state.
        backend: attention backend, as in `model.dispatch`.
        execution: sequence parallelism and the like. Under sequence parallelism every call takes this rank's
            columns [R, S / P] of whole rows, whose document borders `cu_seqlens` holds, and returns its part.

    Raises:
        UserError: an impossible shape or RoPE config.
    """

    def __init__(
        self, config: ModelConfig, rope: RopeConfig, backend: str = "auto", execution: Execution = PLAIN
    ) -> None:
        super().__init__()
        check_shapes(config)
        self.config, self.execution = config, execution
        self.model = Trunk(config, rope, backend, execution)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, execution.fused_loss)
        self._tie()

    def _tie(self) -> None:
        # One Parameter owned by both modules: named_parameters lists it once, as model.embed_tokens.weight,
        # and ZeRO-3's hooks of either module gather it.
        if self.config.tie_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        # to_empty() and moves off the meta device replace Parameters one by one, which would untie them.
        super()._apply(fn, recurse)
        self._tie()
        return self

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights: `drawn_weights` of the generator's seed."""
        parameters = dict(self.named_parameters())
        for name, tensor in drawn_weights(self.config, generator.initial_seed()):
            parameters[name].copy_(tensor)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: Plans,
        trailing: int = 0,
        per_token: bool = False,
        weights: Tensor | None = None,
        probe: Probe | None = None,
    ) -> LossSums | Tensor:
        """Loss of packed rows (fields as in `data.batch.Batch`).

        Args:
            input_ids, labels, positions: int64 [R, S]; labels are already shifted.
            cu_seqlens, max_seqlen: document borders of the flattened rows.
            plans: one per layer, from `model.schedule.plan`.
            trailing: tokens at the end of full-length rows to sum separately; 0: none.
            per_token: return losses fp32 [R, S], 0 where ignored, in place of sums; weights have no part in them.
            weights: fp32 [R, S], of each label's loss in the sum; None: all 1.
            probe: sees each MoBA layer's q, k and chosen blocks.
        """
        hidden = self.hidden(input_ids, positions, cu_seqlens, max_seqlen, plans, probe)
        if per_token:
            return cast(Tensor, self.lm_head(hidden, labels))
        loss_sum, losses = self.lm_head(hidden, labels, weights=weights, summed=True)
        columns = labels.shape[1] * (self.execution.parallel.size if self.execution.parallel else 1)
        return sum_losses(losses, labels, positions, trailing, cu_seqlens, columns, weights, loss_sum)

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: Plans,
        probe: Probe | None = None,
    ) -> Tensor:
        """fp32 [R, S], 0 where ignored. Goes through `forward`, so that ZeRO-3's hooks run."""
        rows = (input_ids, labels, positions, cu_seqlens, max_seqlen, plans)
        losses: Tensor = self(*rows, per_token=True, probe=probe)
        return losses

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: Plans,
        probe: Probe | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [R, S, C]. `probe` sees each MoBA layer's q, k and chosen blocks."""
        hidden: Tensor = self.model(
            input_ids, positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, plans=plans, probe=probe
        )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., V], all at once: for a few positions, not for long rows."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def prefill(self, input_ids_RS: Tensor, cache: KVCache, plans: Plans, chunk: int = 0) -> Tensor:
        """Run the prompts and fill the cache.

        Args:
            input_ids_RS: int64 [R, S], row r holding `cache.lengths[r]` tokens from the left; the rest is ignored.
            cache: fresh.
            plans: one per layer; MoBA layers run as MoBA.
            chunk: at most so many tokens of all rows (at least one per row) run at a time; 0: all. Bounds the
                memory of everything but the cache; the values are those of one run, up to rounding.

        Returns:
            fp32 [R, V]: logits after each row's last token.
        """
        cache.require("prefill")
        if self.execution.parallel is not None:
            return parallel_prefill(self, input_ids_RS, cache, plans, chunk)
        return prefill(self, input_ids_RS, cache, plans, chunk)

    def decode(self, input_ids_R1: Tensor, cache: KVCache, plans: Plans) -> Tensor:
        """One more token per row, int64 [R, 1] -> logits fp32 [R, V]."""
        cache.require("decode")
        if input_ids_R1.shape != (len(cache.lengths), 1):
            raise ValueError(f"decode takes one token per row, {len(cache.lengths)} rows: {input_ids_R1.shape}")
        logits = decode_on_device(self, input_ids_R1, cache, plans)
        cache.end_step_on_host()
        return logits
