"""Choosers against dense masks written from their definitions, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import AttentionConfig
from model.cache import KVCache
from model.moba import attend_blocks, choose_blocks, moba_attention
from model.moba.choosers import choose
from model.schedule import CHOOSERS, LayerPlan, check_chooser, describe, plan
from tests.model.build import VOCAB, hidden_args, packed, tiny_config, tiny_model

BLOCK = 16
LENGTHS = [37, 16, 1, 100, 33]  # tails, an exact block, a single token, many blocks


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    q = torch.randn(total, 4, 16, generator=generator, dtype=dtype)
    k, v = (torch.randn(total, 2, 16, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, v, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def visible(name: str, topk: int) -> Tensor:
    """bool [T, T] from the definition: which token may read which, by place in the document."""
    place = [(doc, i) for doc, length in enumerate(LENGTHS) for i in range(length)]
    mask = torch.zeros(len(place), len(place), dtype=torch.bool)
    for a, (doc, i) in enumerate(place):
        for b, (other, j) in enumerate(place):
            if other != doc or j > i:
                continue
            back = i // BLOCK - j // BLOCK  # blocks between the two, 0 in the own block
            if name == "window":
                mask[a, b] = back <= topk - 1
            else:
                mask[a, b] = back <= topk - 2 or j < BLOCK
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hts,shd->thd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", ["reference", "varlen"])
@pytest.mark.parametrize("topk", [1, 2, 3, 4, 99])
@pytest.mark.parametrize("name", ["window", "sink_window"])
def test_values_and_gradients_match_the_dense_mask(name: str, topk: int, backend: str) -> None:
    if name == "sink_window" and topk == 1:
        return  # refused, see below
    q, k, v, cu_seqlens = inputs()
    results = []
    for run in ("blocks", "dense"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if run == "blocks":
            ids = choose(name, *leaves[:2], block_size=BLOCK, topk=topk, cu_seqlens=cu_seqlens)
            out = attend_blocks(*leaves, ids, block_size=BLOCK, cu_seqlens=cu_seqlens, backend=backend)
        else:
            out = dense(*leaves, visible(name, topk))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", CHOOSERS)
def test_ids_keep_the_contract(name: str) -> None:
    q, k, _, cu_seqlens = inputs(torch.float32)
    ids = choose(name, q, k, block_size=BLOCK, topk=3, cu_seqlens=cu_seqlens)
    assert ids.dtype == torch.int32 and ids.shape == (sum(LENGTHS), 4, 2)
    assert choose(name, q, k, block_size=BLOCK, topk=99, cu_seqlens=cu_seqlens).shape[-1] <= sum(LENGTHS) // BLOCK


def test_moba_is_the_gate() -> None:
    q, k, v, cu_seqlens = inputs(torch.float32)
    settings = {"block_size": BLOCK, "topk": 3, "cu_seqlens": cu_seqlens}
    ids = choose("moba", q, k, **settings)
    assert torch.equal(ids, choose_blocks(q, k, **settings))
    assert not torch.equal(ids.sort(-1).values, choose("window", q, k, **settings).sort(-1).values)
    out = attend_blocks(q, k, v, ids, block_size=BLOCK, cu_seqlens=cu_seqlens)
    assert torch.equal(out, moba_attention(q, k, v, **settings))


def test_one_document_needs_no_borders() -> None:
    q, k, _, _ = inputs(torch.float32)
    borders = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    for name in CHOOSERS:
        alone = choose(name, q, k, block_size=BLOCK, topk=3)
        assert torch.equal(alone, choose(name, q, k, block_size=BLOCK, topk=3, cu_seqlens=borders))


def test_bad_names_and_topk_are_one_line() -> None:
    q, k, _, _ = inputs()
    with pytest.raises(UserError, match=r"attention\.choose=learned is not known: use moba, window, sink_window"):
        choose("learned", q, k, block_size=BLOCK, topk=3)
    with pytest.raises(UserError, match="sink_window needs topk >= 2"):
        check_chooser("attention.choose", "sink_window", 1)
    with pytest.raises(UserError, match=r"attention\.choose=learned"):
        plan(AttentionConfig(kind="moba", choose="learned"), 2, 0.0)
    with pytest.raises(UserError, match="topk=0"):
        choose("window", q, k, block_size=BLOCK, topk=0)


def test_the_plan_carries_the_chooser() -> None:
    plans = plan(AttentionConfig(kind="moba", choose="window", full_last_layers=1), 3, 0.0)
    assert [one.choose for one in plans[:2]] == ["window", "window"]
    assert describe(plans) == "0-1 window 512x3, 2 full"


@pytest.mark.parametrize("name", ["window", "sink_window"])
def test_the_model_follows_the_plan(name: str) -> None:
    """The plan reaches the layers: far tokens matter to a window model only where the definition says so."""
    batch = packed([[80]])
    plans = (LayerPlan("moba", BLOCK, 2, name), LayerPlan("moba", BLOCK, 2, name))
    model = tiny_model(tiny_config(num_layers=1)).double()
    hidden = model.hidden(**hidden_args(batch), plans=plans[:1])  # type: ignore[arg-type]
    changed = hidden_args(batch)
    changed["input_ids"] = changed["input_ids"].clone()  # type: ignore[union-attr]
    changed["input_ids"][0, 20] = (changed["input_ids"][0, 20] + 1) % VOCAB  # type: ignore[index]
    moved = (model.hidden(**changed, plans=plans[:1]) != hidden).any(-1)[0]  # type: ignore[arg-type]
    # Token 20 is in block 1: block 2 sees it in a window of two blocks, later ones do not; no sink holds it.
    until = 48 if name == "window" else 32
    assert moved[20:until].all() and not moved[until:].any() and not moved[:20].any()


@pytest.mark.parametrize("name", ["moba", "window", "sink_window"])
def test_decode_continues_prefill(name: str) -> None:
    """Prefill and decode step by step give the logits of one pass over the whole row."""
    config = tiny_config()
    model, lengths, steps = tiny_model(config).double(), [35, 70], 20
    plans = (LayerPlan("moba", BLOCK, 3, name),) * config.num_layers
    ids = torch.randint(0, VOCAB, (2, max(lengths) + steps), generator=torch.Generator().manual_seed(2))
    cache = KVCache(config, lengths, steps, dtype=torch.float64, device="cpu")
    logits = [model.prefill(ids, cache, plans)]
    rows = torch.arange(2)
    for step in range(steps):
        logits.append(model.decode(ids[rows, torch.tensor(lengths) + step][:, None], cache, plans))
    for row, length in enumerate(lengths):
        whole = ids[row, : length + steps]
        hidden = model.hidden(
            whole[None],
            torch.arange(len(whole))[None],
            torch.tensor([0, len(whole)], dtype=torch.int32),
            len(whole),
            plans,
        )
        expected = model.logits(hidden)[0, length - 1 :]
        got = torch.stack([step[row] for step in logits])
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
