from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import RopeConfig
from model.layers import RMSNorm
from model.schedule import FULL, LayerPlan, full_plans
from model.shapes import num_parameters, parameter_shapes
from model.transformer import CausalLM
from tests.model.build import hidden_args, packed, tiny_config, tiny_model

MOBA = LayerPlan("moba", 16, 2)
FULL2 = full_plans(2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_parameters_are_the_listed_ones(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_embeddings=tied)
    with torch.device("meta"):
        model = CausalLM(config, RopeConfig())
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


def test_meta_model_becomes_real_and_stays_tied() -> None:
    config = tiny_config(tie_embeddings=True)
    with torch.device("meta"):
        model = CausalLM(config, RopeConfig(kind="yarn", factor=2.0, original_seq_len=64))
    model = model.to_empty(device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.init_weights(torch.Generator().manual_seed(3))
    built = CausalLM(config, RopeConfig(kind="yarn", factor=2.0, original_seq_len=64))
    built.init_weights(torch.Generator().manual_seed(3))
    args: dict[str, Any] = packed([[20]])
    assert torch.equal(model(**args, plans=FULL2).loss_sum, built(**args, plans=FULL2).loss_sum)


def test_init_depends_on_seed_and_name_only() -> None:
    config = tiny_config(init_std=0.02, hidden_size=64)
    first, second = CausalLM(config, RopeConfig()), CausalLM(replace(config, num_layers=1), RopeConfig())
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(7))
    other = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        if name in other and not name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(parameter, other[name])
    named = dict(first.named_parameters())
    assert not torch.equal(named["model.embed_tokens.weight"], named["lm_head.weight"])
    assert float(named["lm_head.weight"].detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(named["model.layers.0.mlp.down_proj.weight"].detach().std()) == pytest.approx(0.01, rel=0.1)
    assert bool((named["model.norm.weight"] == 1).all())


@pytest.mark.parametrize("layer_plan", [FULL, MOBA, LayerPlan("moba", 16, 100)], ids=["full", "moba", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packing_changes_no_value(family: str, layer_plan: LayerPlan) -> None:
    """Documents packed into rows give the losses and gradients they give alone."""
    model = tiny_model(tiny_config(family))
    batch: dict[str, Any] = packed([[40, 1, 23], [17, 15, 32]])
    plans = (layer_plan,) * 2
    losses = model.token_losses(**batch, plans=plans).flatten()
    losses.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    borders = batch["cu_seqlens"].tolist()
    for start, end in pairwise(borders):
        alone = {key: batch[key].view(1, -1)[:, start:end] for key in ("input_ids", "labels", "positions")}
        ends = torch.tensor([0, end - start], dtype=torch.int32)
        single = model.token_losses(**alone, cu_seqlens=ends, max_seqlen=end - start, plans=plans)
        torch.testing.assert_close(losses[start:end], single[0], rtol=1e-5, atol=1e-5)
        single.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)


def test_forward_hidden_and_logits_agree() -> None:
    model = tiny_model()
    batch: dict[str, Any] = packed([[30, 34]])
    plans = (MOBA, FULL)
    sums = model(**batch, plans=plans, trailing=0)
    logits = model.logits(model.hidden(**hidden_args(batch), plans=plans))
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    torch.testing.assert_close(sums.loss_sum, want)
    assert int(sums.num_valid) == 62
    losses = model.token_losses(**batch, plans=plans)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), sums.loss_sum)


def test_trailing_reads_full_rows_only() -> None:
    model = tiny_model()
    batch: dict[str, Any] = packed([[32], [32]])
    losses = model.token_losses(**batch, plans=FULL2)
    sums = model(**batch, plans=FULL2, trailing=8)
    torch.testing.assert_close(sums.trailing_sum, losses[:, -8:].sum())
    assert int(sums.trailing_valid) == 14  # the last label of each document is ignored
    assert not sums.trailing_sum.requires_grad


def test_plan_reaches_each_layer_and_is_no_state() -> None:
    model = tiny_model()
    batch: dict[str, Any] = packed([[64]])
    keys = list(model.state_dict())
    seen: dict[tuple[str, ...], float] = {}
    for plans in [(FULL, FULL), (MOBA, FULL), (FULL, MOBA), (MOBA, MOBA), (LayerPlan("moba", 16, 4),) * 2]:
        seen[tuple(map(str, plans))] = float(model(**batch, plans=plans).loss_sum.detach())
    *different, everything = seen.values()
    assert len({round(value, 3) for value in different}) == 4  # every combination computes something else
    assert everything == pytest.approx(different[0], rel=1e-6)  # all blocks chosen: full attention
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="3 plans for 2 layers"):
        model(**batch, plans=(FULL,) * 3)


def test_probe_sees_the_choices_and_changes_nothing() -> None:
    model = tiny_model()
    batch: dict[str, Any] = hidden_args(packed([[40, 24]]))
    plain = model.hidden(**batch, plans=(MOBA, MOBA))
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []

    def probe(layer: int, q: Tensor, k: Tensor, block_ids: Tensor) -> None:
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(block_ids.shape)))
        assert int(block_ids.max()) == 3  # blocks 0-2 are the first document's (two past), 3-4 the second's

    probed = model.hidden(**batch, plans=(MOBA, MOBA), probe=probe)
    torch.testing.assert_close(probed, plain)
    assert seen == [(layer, (64, 4, 16), (64, 2, 16), (64, 4, 1)) for layer in (0, 1)]
    count = len(seen)
    model.hidden(**batch, plans=FULL2, probe=probe)
    assert len(seen) == count


def test_bf16_model_keeps_rope_and_loss_in_fp32() -> None:
    model = tiny_model()
    batch: dict[str, Any] = packed([[64]])
    exact = model(**batch, plans=FULL2)
    half = model.bfloat16()(**batch, plans=FULL2)
    assert half.loss_sum.dtype == torch.float32
    assert half.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=2e-2)
    cos, _ = model.model.rotary.tables(torch.tensor([1_000_003]))
    assert cos.dtype == torch.float32
    assert float(cos[0, 0]) == pytest.approx(float(torch.tensor(1_000_003.0).double().cos()), abs=1e-6)


def test_rms_norm_accumulates_in_fp32() -> None:
    """A bf16 sum of 4096 squares would stall; the fp32 one is right to bf16's own rounding."""
    torch.manual_seed(0)
    x = torch.randn(4, 4096) * 8
    norm = RMSNorm(4096, 1e-6)
    norm.weight.data.normal_()
    x16, norm16 = x.bfloat16(), RMSNorm(4096, 1e-6).bfloat16()
    norm16.weight.data.copy_(norm.weight)
    wide = x16.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm16.weight.double()
    assert float(((norm16(x16).double() - want).abs() / (want.abs() + 1e-3)).max()) < 2**-7


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_kv_heads": 3}, "model.num_kv_heads"),
        ({"head_dim": 0, "num_heads": 6, "num_kv_heads": 2}, "model.head_dim"),
        ({"head_dim": 15}, "even"),
        ({"num_layers": 0}, "model.num_layers"),
    ],
)
def test_impossible_shapes_name_the_key(changes: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        CausalLM(tiny_config(**changes), RopeConfig())
