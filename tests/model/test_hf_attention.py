"""attn_implementation="moba" in transformers, against our own model and against transformers' eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedModel

from conf.errors import UserError
from conf.schema import RopeConfig
from model.hf_attention import register_moba
from model.hf_config import to_config_json
from model.schedule import FULL, LayerPlan
from model.transformer import CausalLM
from tests.model.build import VOCAB, hidden_args, packed, tiny_config, tiny_model

FAMILIES = ["llama", "qwen3"]
MOBA = {"block_size": 16, "topk": 2, "layers": [0]}
DENSE = {**MOBA, "topk": 99, "layers": [0, 1]}
PLANS = (LayerPlan("moba", 16, 2), FULL)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def pair(
    family: str,
    folder: Path,
    moba: dict[str, Any] | None = MOBA,
    implementation: str = "moba",
    dtype: torch.dtype = torch.float64,  # no near-ties in the gate
) -> Any:
    """Our model and theirs with the same weights, theirs loaded from a folder."""
    register_moba()
    ours = tiny_model(tiny_config(family))
    if not (folder / "config.json").exists():
        description = to_config_json(ours.config, RopeConfig(), seq_len=256, dtype="float32")
        config = AutoConfig.for_model(**description)
        if moba is not None:
            config.moba = moba
        theirs = AutoModelForCausalLM.from_config(config)
        theirs.load_state_dict(ours.state_dict())
        theirs.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=dtype)
    return ours.to(dtype), theirs.eval()


def our_logits(model: CausalLM, ids: Tensor, plans: Any = PLANS) -> Tensor:
    """[S, V] of one sequence."""
    length = ids.numel()
    borders = torch.tensor([0, length], dtype=torch.int32)
    hidden = model.hidden(ids.view(1, -1), torch.arange(length)[None], borders, length, plans)
    return model.logits(hidden)[0]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], columns: int) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(len(lengths), columns, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, columns - length :] = 1
    return tokens(len(lengths), columns), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_our_model(family: str, tmp_path: Path) -> None:
    """Packed rows with restarting position_ids, trained without a cache."""
    ours, theirs = pair(family, tmp_path)
    batch = packed([[70, 30], [40, 60]])
    expected = ours.logits(ours.hidden(**hidden_args(batch), plans=PLANS))  # type: ignore[arg-type]
    theirs.train()
    logits = theirs(batch["input_ids"], position_ids=batch["positions"], use_cache=False).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    named = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        want = named[name].grad
        assert want is not None and parameter.grad is not None, name
        error = (parameter.grad - want).abs().max() / want.abs().max()
        assert error < 1e-3, f"{name}: {error}"


def test_moba_is_not_dense(tmp_path: Path) -> None:
    _, theirs = pair("llama", tmp_path)
    _, dense = pair("llama", tmp_path, implementation="eager")
    ids = tokens(1, 100)
    ours, full = theirs(ids).logits[0], dense(ids).logits[0]
    assert (ours[:32] - full[:32]).abs().max() < 1e-3 < (ours[32:] - full[32:]).abs().max()


def test_packed_rows_are_followed_with_a_cache_too(tmp_path: Path) -> None:
    """use_cache=True is transformers' default, in which its own attention would mix the documents."""
    ours, theirs = pair("llama", tmp_path)
    batch = packed([[70, 30], [40, 60]])
    expected = ours.logits(ours.hidden(**hidden_args(batch), plans=PLANS))  # type: ignore[arg-type]
    logits = theirs(batch["input_ids"], position_ids=batch["positions"], use_cache=True).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_enough_blocks_equal_eager_attention(family: str, padding: str, tmp_path: Path) -> None:
    # float32: in float64, eager attention gives NaN for rows padded on the left
    _, theirs = pair(family, tmp_path, DENSE, dtype=torch.float32)
    _, eager = pair(family, tmp_path, implementation="eager", dtype=torch.float32)
    ids, mask = left_padded([50, 13, 64], 64)
    if padding == "right":
        mask = mask.flip(1)
    elif padding == "none":
        mask = torch.ones_like(mask)
    logits, expected = theirs(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)
    (logits[real] ** 2).sum().backward()
    (expected[real] ** 2).sum().backward()
    for ours, want in zip(theirs.parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None and want.grad is not None
        torch.testing.assert_close(ours.grad, want.grad, rtol=1e-3, atol=1e-3 * float(want.grad.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_block(side: str, tmp_path: Path) -> None:
    """Blocks start at a row's first token, wherever padding puts it."""
    ours, theirs = pair("llama", tmp_path)
    lengths = [75, 41, 90]
    ids, mask = left_padded(lengths, 90)
    mask = mask if side == "left" else mask.flip(1)
    logits = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    without_positions = theirs(ids, attention_mask=mask).logits
    for row in range(len(lengths)):
        real = mask[row].bool()
        expected = our_logits(ours, ids[row][real])
        torch.testing.assert_close(logits[row][real], expected, **CLOSE)
        torch.testing.assert_close(without_positions[row][real], expected, **CLOSE)


@torch.no_grad()
def step_by_step(model: PreTrainedModel, ids: Tensor, cuts: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, fed in pieces that end at `cuts`, with one cache."""
    cache, pieces, start = DynamicCache(config=model.config), [], 0
    for end in cuts:
        part = {"attention_mask": mask[:, :end]} if mask is not None else {}
        if mask is not None:
            part["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        pieces.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **part).logits)
        start = end
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_stays_moba(family: str, tmp_path: Path) -> None:
    ours, theirs = pair(family, tmp_path)
    ids = tokens(2, 110)
    logits = step_by_step(theirs, ids, [30, 32, 75, 110])
    for row in range(2):
        torch.testing.assert_close(logits[row], our_logits(ours, ids[row]), **CLOSE)


def test_chunked_prefill_with_padding(tmp_path: Path) -> None:
    ours, theirs = pair("llama", tmp_path)
    ids, mask = left_padded([75, 20, 90], 90)  # the second row has no token in the first chunks
    logits = step_by_step(theirs, ids, [30, 60, 90], mask)
    for row in range(3):
        real = mask[row].bool()
        torch.testing.assert_close(logits[row][real], our_logits(ours, ids[row][real]), **CLOSE)


@pytest.mark.parametrize("choose", ["moba", "window", "sink_window"])
def test_moba_decode_equals_one_pass(choose: str, tmp_path: Path) -> None:
    ours, theirs = pair("llama", tmp_path, {**MOBA, "decode": "moba", "choose": choose})
    plans = (LayerPlan("moba", 16, 2, choose), FULL)
    ids, mask = left_padded([50, 81], 81)
    logits = step_by_step(theirs, ids, list(range(40, 82)), mask)
    for row in range(2):
        real = mask[row].bool()
        torch.testing.assert_close(logits[row][real], our_logits(ours, ids[row][real], plans), **CLOSE)


def test_full_decode_is_the_default(tmp_path: Path) -> None:
    """The keys of the prefill come from MoBA, the step itself reads all of them."""
    ours, theirs = pair("llama", tmp_path)
    ids = tokens(1, 101)
    logits = step_by_step(theirs, ids, [100, 101])[0, -1]
    assert (logits - our_logits(ours, ids[0])[-1]).abs().max() > 1e-3  # not MoBA
    moba, eager = pair("llama", tmp_path), pair("llama", tmp_path, implementation="eager")
    cache = DynamicCache(config=moba[1].config)
    with torch.no_grad():
        moba[1](ids[:, :100], past_key_values=cache, use_cache=True)
        expected = eager[1](ids[:, 100:], past_key_values=cache, use_cache=True).logits[0, -1]
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str, tmp_path: Path) -> None:
    """Greedy, left padded, token for token: as eager when all blocks are chosen, as our model when not."""
    ids, mask = left_padded([40, 64, 5], 64)
    ask = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    _, dense = pair(family, tmp_path / "dense", DENSE, dtype=torch.float32)
    _, eager = pair(family, tmp_path / "dense", implementation="eager", dtype=torch.float32)
    want = eager.generate(ids, attention_mask=mask, **ask)
    assert torch.equal(dense.generate(ids, attention_mask=mask, **ask), want)
    ours, theirs = pair(family, tmp_path / "moba", {**MOBA, "decode": "moba"})
    got = theirs.generate(ids, attention_mask=mask, **ask)
    assert not torch.equal(got, want)
    for row in range(3):
        text = ids[row][mask[row].bool()]
        for _ in range(24):
            text = torch.cat([text, our_logits(ours, text)[-1].argmax()[None]])
        assert text[-24:].tolist() == got[row, -24:].tolist()
    chunked = theirs.generate(ids, attention_mask=mask, prefill_chunk_size=20, **ask)
    assert torch.equal(chunked, got)


def test_settings_travel_and_registration_repeats(tmp_path: Path) -> None:
    _, theirs = pair("llama", tmp_path)
    register_moba()
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="moba", dtype=torch.float64
    )
    ids = tokens(1, 60)
    assert again.config.moba == MOBA
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        _, theirs = pair("llama", tmp_path)
        theirs.train()
        if checkpointing:
            theirs.gradient_checkpointing_enable()
        theirs(tokens(2, 60), use_cache=False).logits.square().sum().backward()
        grads.append([p.grad for p in theirs.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    "entry,message",
    [
        (None, 'config.json has no entry "moba"'),
        ({"block_size": 16, "topk": 2}, "must have block_size, topk and layers"),
        ({**MOBA, "stride": 4}, "must have block_size"),
        ({**MOBA, "topk": 0}, "topk=0 must be integers of at least 1"),
        ({**MOBA, "layers": [2]}, r"layers=\[2\] must be a list of numbers from 0 to 1"),
        ({**MOBA, "choose": "best"}, "choose=best is not known"),
        ({**MOBA, "decode": "fast"}, "decode=fast is not known"),
    ],
)
def test_settings_are_checked(entry: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    _, theirs = pair("llama", tmp_path, entry)
    with pytest.raises(UserError, match=message):
        theirs(tokens(1, 20))


def test_other_model_classes_are_refused() -> None:
    register_moba()
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    config.moba = {**MOBA}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba")
    with pytest.raises(UserError, match="supports llama, mistral, qwen2, qwen3, not model_type=gpt2"):
        model(tokens(1, 20))


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    _, theirs = pair("llama", tmp_path)
    ids = tokens(1, 40)
    holes = torch.ones(1, 40, dtype=torch.long)
    holes[0, 10:12] = 0
    with pytest.raises(UserError, match="padding between tokens"):
        theirs(ids, attention_mask=holes)
    with pytest.raises(UserError, match="made elsewhere"):
        theirs(ids, attention_mask=torch.zeros(1, 1, 40, 40, dtype=torch.float64))
    with pytest.raises(UserError, match="neither count up by one nor restart at 0"):
        theirs(ids, position_ids=torch.arange(40)[None] * 2)
    with pytest.raises(UserError, match="cu_seq_lens_k"):
        theirs(ids, cu_seq_lens_k=torch.tensor([0, 15, 40], dtype=torch.int32))
    with pytest.raises(UserError, match="static"):
        theirs.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    theirs.config.attention_dropout = 0.1
    for layer in theirs.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="no dropout"):
        theirs.train()(ids)


def test_packed_documents_are_not_continued_from_a_cache(tmp_path: Path) -> None:
    _, theirs = pair("llama", tmp_path)
    cache = DynamicCache(config=theirs.config)
    with torch.no_grad():
        positions = torch.cat([torch.arange(30), torch.arange(10)])[None]
        theirs(tokens(1, 40), position_ids=positions, past_key_values=cache, use_cache=True)
        with pytest.raises(UserError, match="cannot be continued from a KV cache"):
            theirs(tokens(1, 1), position_ids=torch.tensor([[10]]), past_key_values=cache, use_cache=True)


def test_no_backward_through_a_cache(tmp_path: Path) -> None:
    _, theirs = pair("llama", tmp_path)
    cache = DynamicCache(config=theirs.config)
    theirs(tokens(1, 40), past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="use_cache=False"):
        theirs(tokens(1, 8), past_key_values=cache, use_cache=True)


def test_sliding_window_is_refused() -> None:
    register_moba()
    description = to_config_json(tiny_config("mistral"), RopeConfig(), seq_len=256, dtype="float32")
    config = AutoConfig.for_model(**{**description, "sliding_window": 32})
    config.moba = {**MOBA}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba")
    with pytest.raises(UserError, match="no sliding window"):
        model(tokens(1, 20))
