"""The config.json of folders people have: what transformers reads is the same after a way through ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from model.hf_config import read_config_json, to_config_json

_COMMON = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "use_cache": True,
}  # fmt: skip
FOLDERS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0",
        "vocab_size": 128256,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "use_sliding_window": False, "transformers_version": "4.40.1", "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "transformers_version": "4.51.0", "vocab_size": 151936,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
    },
}  # fmt: skip
# Of tokenizers, which travel by themselves; head_dim is said where it was derived; no layer has a window.
OTHERWISE = {"bos_token_id", "eos_token_id", "head_dim", "max_window_layers"}


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    path, original = tmp_path / "config.json", {**_COMMON, **FOLDERS[name]}
    path.write_text(json.dumps(original))
    before, parsed = AutoConfig.from_pretrained(tmp_path).to_dict(), read_config_json(tmp_path)
    assert parsed.model.head_dim == original.get("head_dim", parsed.model.hidden_size // parsed.model.num_heads)
    path.write_text(
        json.dumps(to_config_json(parsed.model, parsed.rope, seq_len=parsed.seq_len, dtype="bfloat16"))
    )
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key for key in before | after if before.get(key) != after.get(key)} <= OTHERWISE
