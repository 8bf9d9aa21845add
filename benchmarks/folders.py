"""The folder that `benchmarks/continue_folder.py` continues: model and tokenizer as transformers saves them."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of the model and of the run. `exact`: tokens compared in fp32."""

    model: dict[str, Any]
    vocab_size: int
    seq_len: int
    block_size: int
    exact: int
    overrides: tuple[str, ...]


_LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
_SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
_PADDING = 64  # of the vocabulary beyond the tokenizer's, as in Qwen's folders
SHAPES = {
    "llama-1b": Shape(_LLAMA_1B, 8192, 32_768, 128, 4096, ("engine.checkpointing=full",)),
    "small": Shape(_SMALL, 2048, 8192, 128, 4096, ()),
    "tiny": Shape(_TINY, 512, 512, 16, 512, ("engine.precision=fp32",)),
}


def corpus(folder: Path) -> None:
    """The modules at the top of Python's standard library, a file each."""
    folder.mkdir(parents=True)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        shutil.copyfile(path, folder / path.name)


def save_folder(shape: Shape, texts: Path, folder: Path, device: str) -> None:
    """Model and tokenizer as transformers saves them. Several ids end an answer, as in instruction-tuned ones."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=shape.vocab_size, special_tokens=special, initial_alphabet=alphabet)
    words.train([str(path) for path in sorted(texts.iterdir())[:60]], trainer)
    bos, eos = special
    words.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])  # as Llama 3's
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos).save_pretrained(folder)
    config = LlamaConfig(
        **shape.model, vocab_size=shape.vocab_size + _PADDING, tie_word_embeddings=True,
        max_position_embeddings=131_072, rope_parameters=ROPE, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [1, 2]
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
