"""Key convolution: against a naive loop, within documents only, the identity at first, the same in decode."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import RopeConfig
from model.cache import KVCache
from model.hf_config import to_config_json
from model.key_conv import KeyConv
from model.schedule import LayerPlan, full_plans
from model.shapes import num_parameters, parameter_shapes
from model.transformer import CausalLM
from tests.model.build import VOCAB, packed, tiny_config, tiny_model

LENGTHS = [1, 2, 9, 4]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


def conv_of(kernel_size: int, scale: float = 1.0) -> KeyConv:
    conv = KeyConv(2, 3, kernel_size).double()
    torch.nn.init.normal_(conv.weight, std=scale, generator=torch.Generator().manual_seed(0))
    return conv


def keys(total: int = sum(LENGTHS)) -> Tensor:
    return torch.randn(total, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive(k: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    out = torch.empty_like(k)
    for t in range(k.shape[0]):
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                total = 0.0
                for lag in range(weight.shape[0]):
                    if lag <= int(positions[t]):
                        total += float(weight[lag, h, d] * k[t - lag, h, d])
                out[t, h, d] = float(k[t, h, d]) + total / (1 + math.exp(-total))
    return out


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_naive_loop(kernel_size: int) -> None:
    conv, k = conv_of(kernel_size), keys()
    torch.testing.assert_close(conv(k, POSITIONS), naive(k, conv.weight.detach(), POSITIONS), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_packed_is_separate(kernel_size: int) -> None:
    conv, k = conv_of(kernel_size), keys()
    apart = [conv(part, torch.arange(len(part))) for part in k.split(LENGTHS)]
    torch.testing.assert_close(conv(k, POSITIONS), torch.cat(apart), atol=1e-14, rtol=0)


def test_nothing_leaks_out_of_a_document() -> None:
    conv, k = conv_of(5), keys()
    expected = conv(k, POSITIONS)
    poisoned = k.clone()
    poisoned[3:12] = torch.nan  # the third document
    out = conv(poisoned, POSITIONS)
    assert torch.equal(out[:3], expected[:3]) and torch.equal(out[12:], expected[12:])


def test_gradients() -> None:
    conv, k = conv_of(3), keys(7).requires_grad_()
    places = torch.tensor([0, 1, 2, 3, 0, 1, 2])

    def run(k: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (k, places))

    assert torch.autograd.gradcheck(run, (k, conv.weight))


def test_new_module_is_the_identity_and_trains() -> None:
    conv, k = KeyConv(2, 3, 3).double(), keys()
    assert torch.equal(conv(k, POSITIONS), k)
    conv(k, POSITIONS).square().sum().backward()
    assert conv.weight.grad is not None and (conv.weight.grad.abs() > 0).all()


def test_other_kernel_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.key_conv=4: the kernel size is 3 or 5"):
        KeyConv(2, 3, 4)


@pytest.mark.parametrize("plan", [LayerPlan("full"), LayerPlan("moba", 16, 2)])
def test_switching_it_on_changes_no_loss(plan: LayerPlan) -> None:
    config = tiny_config(qk_norm=True, family="qwen3")
    on = replace(config, key_conv=3)
    batch = packed([[50, 30], [80 - 33, 33]])
    plans = (plan,) * config.num_layers
    losses = [tiny_model(c).token_losses(**batch, plans=plans) for c in (config, on)]  # type: ignore[arg-type]
    assert torch.equal(losses[0], losses[1])


def test_the_shape_table_knows_it() -> None:
    config = tiny_config(key_conv=5)
    model = CausalLM(config, RopeConfig())
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(config)
    assert num_parameters(config) == num_parameters(tiny_config()) + 2 * 5 * 2 * 16
    assert parameter_shapes(config)["model.layers.1.self_attn.key_conv.weight"] == (5, 2, 16)


def random_conv_model(kernel_size: int = 5) -> CausalLM:
    model = tiny_model(tiny_config(key_conv=kernel_size)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "key_conv" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def test_documents_of_a_packed_row_stay_apart_in_the_model() -> None:
    model, lengths = random_conv_model(), [50, 30]
    batch = packed([lengths])
    plans = full_plans(2)
    together = model.token_losses(**batch, plans=plans)[0]  # type: ignore[arg-type]
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = model.token_losses(
            batch["input_ids"][:, part],  # type: ignore[index]
            batch["labels"][:, part],  # type: ignore[index]
            torch.arange(length)[None],
            torch.tensor([0, length], dtype=torch.int32),
            length,
            plans,
        )[0]
        torch.testing.assert_close(together[part], alone, atol=1e-6, rtol=1e-6)
        start += length


def test_it_is_in_use() -> None:
    batch = packed([[50, 30]])
    with_it = random_conv_model().token_losses(**batch, plans=full_plans(2))  # type: ignore[arg-type]
    without = tiny_model().double().token_losses(**batch, plans=full_plans(2))  # type: ignore[arg-type]
    assert not torch.allclose(with_it, without, atol=1e-2)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_decode_remembers_the_keys_before(kernel_size: int) -> None:
    """Prompts shorter than the kernel included: prefill and decode equal one pass over the whole row."""
    model, lengths, steps = random_conv_model(kernel_size), [1, 3, 20], 8
    plans = full_plans(2)
    ids = torch.randint(0, VOCAB, (3, max(lengths) + steps), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model.config, lengths, steps, dtype=torch.float64, device="cpu")
    logits = [model.prefill(ids, cache, plans)]
    for step in range(steps):
        token = ids[torch.arange(3), torch.tensor(lengths) + step][:, None]
        logits.append(model.decode(token, cache, plans))
    for row, length in enumerate(lengths):
        total = length + steps
        borders = torch.tensor([0, total], dtype=torch.int32)
        hidden = model.hidden(ids[row, None, :total], torch.arange(total)[None], borders, total, plans)
        got = torch.stack([step[row] for step in logits]).double()
        torch.testing.assert_close(got, model.logits(hidden)[0, length - 1 :], atol=1e-4, rtol=1e-4)


def test_hugging_face_export_refuses() -> None:
    with pytest.raises(UserError, match=r"model\.key_conv=3: a Hugging Face folder cannot carry"):
        to_config_json(tiny_config(key_conv=3), RopeConfig(), seq_len=64, dtype="float32")
