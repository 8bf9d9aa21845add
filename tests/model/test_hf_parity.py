"""Random-weight models of every family, saved by transformers itself, against ours."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from conf.constants import IGNORE_INDEX
from model.cache import KVCache
from model.hf import read_hf
from model.schedule import full_plans
from model.transformer import CausalLM
from model.weights import load_weights
from tests.model.build import VOCAB, hidden_args, packed

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
CASES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama3_tied_head_dim": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16, rope_parameters=LLAMA3),
    "llama_linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_tied_yarn": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3_tied": Qwen3Config(**{**SIZES, "rms_norm_eps": 1e-5}, head_dim=8, tie_word_embeddings=True),
}
PLANS = full_plans(2)


def theirs(name: str, folder: Path) -> PreTrainedModel:
    """A model of the case, norms and biases at random too, saved in `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CASES[name], attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def ours(folder: Path) -> CausalLM:
    found = read_hf(folder)
    with torch.device("meta"):
        model = CausalLM(found.config, found.rope)
    model = model.to_empty(device="cpu")
    load_weights(model, found.weights, str(folder))
    return model


def their_logits(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Document by document, so that theirs knows nothing of packing; [T, V]."""
    borders = batch["cu_seqlens"].tolist()
    ids = batch["input_ids"].flatten()
    return torch.cat([model(ids[None, a:b]).logits[0] for a, b in pairwise(borders)])


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name: str, tmp_path: Path) -> None:
    """One packed row and two rows of several documents: logits 1e-4, loss 1e-5, gradients 1e-3 (relative)."""
    reference = theirs(name, tmp_path)
    model = ours(tmp_path)
    for lengths in ([[120]], [[50, 14], [1, 63]]):
        batch: dict[str, Any] = packed(lengths)
        logits = model.logits(model.hidden(**hidden_args(batch), plans=PLANS)).flatten(0, 1)
        want = their_logits(reference, batch)
        assert (logits - want).abs().max() < 1e-4 * max(1.0, float(want.detach().abs().max()))
        assert torch.equal(logits.argmax(-1), want.argmax(-1))

        labels = batch["labels"].flatten()
        their_loss = torch.nn.functional.cross_entropy(want, labels, ignore_index=IGNORE_INDEX)
        sums = model(**batch, plans=PLANS)
        loss = sums.loss_sum / sums.num_valid
        assert float((loss - their_loss).detach().abs()) < 1e-5 * max(1.0, float(their_loss.detach()))

        model.zero_grad()
        reference.zero_grad()
        loss.backward()
        their_loss.backward()
        their_grads = {n: p.grad for n, p in reference.named_parameters()}
        assert set(their_grads) == {n for n, _ in model.named_parameters()}
        for n, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert (parameter.grad - their_grads[n]).norm() <= 1e-3 * their_grads[n].norm(), n


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation(name: str, tmp_path: Path) -> None:
    """64 tokens through both caches, from two prompts of unequal length."""
    reference = theirs(name, tmp_path)
    model = ours(tmp_path)
    prompts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 21)]
    want = []
    for prompt in prompts:
        out = reference.generate(
            prompt[None],
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            suppress_tokens=[2],
            pad_token_id=0,
        )
        want.append(out[0, prompt.numel() :])
    cache = KVCache(model.config, [30, 21], 64, dtype=torch.float32, device="cpu")
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    logits = model.prefill(padded, cache, PLANS)
    got = []
    for _ in range(64):
        logits[:, 2] = float("-inf")  # no end of text, on both sides
        got.append(logits.argmax(-1))
        logits = model.decode(got[-1][:, None], cache, PLANS)
    assert torch.equal(torch.stack(got, 1), torch.stack(want))
