"""MoBA inside transformers: `register_moba()`, then `from_pretrained(DIR, attn_implementation="moba")`.

Block size, topk and layers come from the entry `moba` of the folder's config.json, which `moba export` writes:
{"block_size", "topk", "layers"}, and optionally "choose" (a chooser of `model.moba.choosers`) and "decode": "full"
(default, as in the evaluation of the MoBA paper, arXiv 2502.13189, section 3.3) or "moba".

A forward pass without cached keys is training or prefill, several new tokens behind a cache are a chunk of a
prefill: both are MoBA. One new token behind a cache is a decode step. Packed batches (`position_ids` that restart
at 0) and padding at either end of a row are followed; what cannot be followed is an error, never dense attention.

Shape legend: B rows, H query heads, Hkv key heads, Q query columns, N key columns, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from model.full import full_attention
from model.hf_rows import RowLayout, lay_out
from model.hf_settings import MobaSettings
from model.moba import attend_blocks, moba_attention
from model.moba.choosers import choose
from model.moba.suffix import suffix_attention
from model.schedule import FULL, LayerPlan

NAME = "moba"
_OPTION = 'attn_implementation="moba"'
# Arguments of attention functions that change the result and that MoBA does not have.
_FOREIGN = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias", "output_attentions")


def register_moba() -> None:
    """Make `attn_implementation="moba"` known to transformers. Call it once before loading; again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, moba_attention_forward)
    AttentionMaskInterface.register(NAME, moba_mask)


class MobaMask:
    """What the layers of one forward pass share; stands where other attentions have their mask.

    Not a tensor and not a dataclass, so that nothing on the way converts, copies or moves it. The first layer adds
    `position_ids`, which transformers gives to layers only, and the layout is made once.
    """

    def __init__(self, settings: MobaSettings, real_BN: Tensor | None, num_queries: int, num_keys: int) -> None:
        self.settings, self.num_queries, self.num_keys = settings, num_queries, num_keys
        self._real_BN = real_BN
        self._layout: RowLayout | None = None

    def layout(self, batch: int, position_ids: Tensor, cu_seqlens: Tensor | None) -> RowLayout:
        """The layout of this forward pass; arguments count for the first layer only."""
        if self._layout is None:
            positions = position_ids.expand(batch, -1)
            self._layout = lay_out(self._real_BN, positions, self.num_keys, cu_seqlens)
        return self._layout


def moba_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    **unused: Any,
) -> MobaMask:
    """Mask function of transformers' mask interface (`ALL_MASK_ATTENTION_FUNCTIONS`).

    Raises:
        UserError: settings (see `MobaSettings.of`), or masks MoBA cannot follow.
    """
    if use_vmap:
        raise UserError(f"{_OPTION} takes padding masks only, no mask functions of your own")
    if local_size is not None:
        raise UserError(f"{_OPTION} has no sliding window: set sliding_window to null in config.json")
    if isinstance(q_offset, Tensor) or kv_offset != 0 or q_offset + q_length != kv_length:
        raise UserError(f"{_OPTION} needs the default growing cache (DynamicCache), not a static one")
    return MobaMask(MobaSettings.of(config), attention_mask, q_length, kv_length)


def moba_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MobaMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`).

    Args:
        query: [B, H, Q, D] after RoPE; key, value: [B, Hkv, N, D], cached ones included.
        attention_mask: what `moba_mask` made.

    Returns:
        [B, Q, H, D], zeros at padding; no attention weights.

    Raises:
        UserError: arguments that MoBA cannot honour.
    """
    _refuse(module, attention_mask, dropout, position_ids, kwargs)
    assert isinstance(attention_mask, MobaMask) and position_ids is not None  # `_refuse` said so
    B, H, Q, D = query.shape
    if (Q, key.shape[2]) != (attention_mask.num_queries, attention_mask.num_keys):
        raise UserError(
            f"{_OPTION}: {Q} queries and {key.shape[2]} keys, but a mask for "
            f"{attention_mask.num_queries} and {attention_mask.num_keys}: this cache drops or pads keys"
        )
    layout = attention_mask.layout(B, position_ids, kwargs.get("cu_seq_lens_k"))
    if not layout.query_lengths:
        return query.new_zeros(B, Q, H, D), None
    q_THD = _flat(query, layout.query_index)
    k_SHD, v_SHD = _flat(key, layout.key_index), _flat(value, layout.key_index)
    layer: Any = module.layer_idx
    plan = attention_mask.settings.plans[layer]
    out = _attend(q_THD, k_SHD, v_SHD, layout, plan, attention_mask.settings.decode, scaling, decodes=Q == 1)
    if layout.query_index is not None:
        out = out.new_zeros(B * Q, H, D).index_copy(0, layout.query_index, out)
    return out.view(B, Q, H, D), None


def _attend(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    layout: RowLayout,
    plan: LayerPlan,
    decode: str,
    scale: float | None,
    *,
    decodes: bool,
) -> Tensor:
    """Attention over sequences laid end to end, by the layer's plan."""
    if layout.cached:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_THD, k_SHD, v_SHD)):
            raise UserError(
                "MoBA over cached keys has no backward: train with use_cache=False, infer under no_grad"
            )
        return suffix_attention(
            q_THD,
            k_SHD,
            v_SHD,
            query_lengths=layout.query_lengths,
            key_lengths=layout.key_lengths,
            layer_plan=FULL if decodes and decode == "full" else plan,
            softmax_scale=scale,
        )
    cu_seqlens = layout.cu_seqlens
    if plan.kind == "full":
        return full_attention(
            q_THD, k_SHD, v_SHD, cu_seqlens=cu_seqlens, max_seqlen=max(layout.key_lengths), softmax_scale=scale
        )
    shape: dict[str, Any] = {"block_size": plan.block_size, "cu_seqlens": cu_seqlens}
    if plan.choose == "moba":
        longest = max(layout.key_lengths)
        return moba_attention(
            q_THD, k_SHD, v_SHD, topk=plan.topk, max_seqlen=longest, softmax_scale=scale, **shape
        )
    ids = choose(plan.choose, q_THD, k_SHD, topk=plan.topk, **shape)
    return attend_blocks(q_THD, k_SHD, v_SHD, ids, softmax_scale=scale, **shape)


def _flat(x_BHQD: Tensor, index: Tensor | None) -> Tensor:
    """[B, H, Q, D] -> [T, H, D]: real tokens only."""
    flat = x_BHQD.transpose(1, 2).flatten(0, 1)
    return flat if index is None else flat[index]


def _refuse(
    module: nn.Module, mask: object, dropout: float, position_ids: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Say no to what would otherwise be dropped without a word."""
    if not isinstance(mask, MobaMask):
        raise UserError(
            f"{_OPTION} takes 2D padding masks: "
            + ("call register_moba() before the forward pass" if mask is None else "got a mask made elsewhere")
        )
    if position_ids is None:
        raise UserError(f"{_OPTION} needs position_ids, which this model class does not pass on")
    if dropout:
        raise UserError(f"{_OPTION} has no dropout: set attention_dropout to 0, not {dropout}")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UserError(f"{_OPTION} is causal: is_causal=False is not possible")
    for name in _FOREIGN:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UserError(f"{_OPTION} has no {name}")
