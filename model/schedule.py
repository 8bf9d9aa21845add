"""Which layer attends how, now: a pure function of the attention config and the share of the stage done.

Nothing here touches weights or state: switching between full attention and MoBA is a change of the plan
that the next forward pass receives (MoBA paper, arXiv 2502.13189, sections 2.2 and 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from conf.errors import UserError
from conf.schema import AttentionConfig


@dataclass(frozen=True)
class LayerPlan:
    """How one layer attends. `block_size` (tokens) and `topk` (own block included) are 0 for `full`.

    `choose` names who picks the past blocks (`model.moba.choosers`).
    """

    kind: Literal["full", "moba"]
    block_size: int = 0
    topk: int = 0
    choose: str = "moba"


FULL = LayerPlan("full")
CHOOSERS = ("moba", "window", "sink_window")


def full_plans(num_layers: int) -> tuple[LayerPlan, ...]:
    """Exact causal attention in every layer."""
    return (FULL,) * num_layers


def plan(attention: AttentionConfig, num_layers: int, fraction: float) -> tuple[LayerPlan, ...]:
    """The plan of every layer.

    Args:
        attention: the stage's settings.
        num_layers: layers of the model.
        fraction: tokens seen in the stage / tokens of the stage, 0 at its first step.

    Raises:
        UserError: a setting that names a layer the model does not have, or an impossible topk or block size.
    """
    if attention.kind not in ("full", "moba"):
        raise UserError(f"attention.kind={attention.kind} is not known: use full or moba")
    if attention.kind == "full" or (attention.full_after < 1.0 and fraction >= attention.full_after):
        return full_plans(num_layers)
    full = full_layers(attention, num_layers)
    topk = topk_at(attention, fraction)
    if attention.block_size < 1:
        raise UserError(f"attention.block_size={attention.block_size} must be at least 1")
    check_chooser("attention.choose", attention.choose, topk)
    moba = LayerPlan("moba", attention.block_size, topk, attention.choose)
    return tuple(FULL if layer in full else moba for layer in range(num_layers))


def full_layers(attention: AttentionConfig, num_layers: int) -> frozenset[int]:
    """Layers that stay full while the others use MoBA: the union of the three ways to name them."""
    wrong = [layer for layer in attention.full_layers if not 0 <= layer < num_layers]
    if wrong:
        raise UserError(f"attention.full_layers: {wrong} not in the model: use 0 to {num_layers - 1}")
    if not 0 <= attention.full_last_layers <= num_layers:
        raise UserError(f"attention.full_last_layers={attention.full_last_layers}: use 0 to {num_layers}")
    if attention.full_every < 0:
        raise UserError(f"attention.full_every={attention.full_every}: use 0 (none) or n for every n-th layer")
    full = set(attention.full_layers) | set(range(num_layers - attention.full_last_layers, num_layers))
    if attention.full_every:
        full |= set(range(attention.full_every - 1, num_layers, attention.full_every))
    return frozenset(full)


def topk_at(attention: AttentionConfig, fraction: float) -> int:
    """`topk` at this share of the stage: the warm-up values share its first part evenly, then `topk`."""
    steps = attention.topk_warmup
    values = [*steps, attention.topk]
    if min(values) < 1:
        raise UserError(f"attention.topk and topk_warmup count the own block: {min(values)} must be at least 1")
    if bool(steps) != (attention.topk_warmup_until > 0):
        raise UserError("attention.topk_warmup and attention.topk_warmup_until go together: set both or none")
    if not steps or fraction >= attention.topk_warmup_until:
        return attention.topk
    return steps[min(int(fraction / attention.topk_warmup_until * len(steps)), len(steps) - 1)]


def check_chooser(key: str, name: str, topk: int) -> None:
    """Refuse an unknown chooser, and sink_window without room for the sink. `key` is the setting to name."""
    if name not in CHOOSERS:
        raise UserError(f"{key}={name} is not known: use {', '.join(CHOOSERS)}")
    if name == "sink_window" and topk < 2:
        raise UserError(f"{key}=sink_window needs topk >= 2 (own block and first block), not topk={topk}")


def describe(plans: tuple[LayerPlan, ...]) -> str:
    """Short text for logs and metrics, such as `0-28 moba 4096x12, 29-31 full` (block size x topk)."""
    parts = []
    for layer_plan, group in groupby(enumerate(plans), key=lambda item: item[1]):
        layers = [index for index, _ in group]
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        parts.append(f"{span} {_kind_text(layer_plan)}")
    if len(parts) == 1:
        return _kind_text(plans[0])
    return ", ".join(parts)


def _kind_text(layer_plan: LayerPlan) -> str:
    if layer_plan.kind == "full":
        return "full"
    return f"{layer_plan.choose} {layer_plan.block_size}x{layer_plan.topk}"
