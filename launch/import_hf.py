"""`moba import`: a Hugging Face folder as a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.compose import compose
from conf.errors import UserError
from conf.paths import CheckpointPaths
from conf.ranges import check_fields
from conf.schema import AttentionConfig, ImportConfig, StageConfig, StageRopeConfig, TrainConfig
from launch.command import Command

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from model.hf import HfWeights
    from model.hf_config import HfConfig

STAGE = "imported"  # name of the one stage that the checkpoint claims to have finished
SHARD_BYTES = 256 * 2**20  # of a weights file; in memory it lies twice for a moment


def resolve(overrides: Sequence[str]) -> ImportConfig:
    return compose("import", overrides)


def run(config: ImportConfig) -> int:
    check_fields(config)
    print(f"wrote {import_hf(Path(config.hf), Path(config.out), config.tokenizer)}")
    return 0


def import_hf(hf: Path, out: Path, tokenizer: str = "", shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the checkpoint `out` of the Hugging Face folder `hf`, tensor by tensor, whole or not at all.

    The weights keep the folder's dtype: nothing is lost, and a bf16 folder does not double in size. Training takes
    its fp32 master weights from them. Memory: two weights files of `shard_bytes`, or two of the largest tensor.

    Args:
        tokenizer: folder or .model file; empty: the one in `hf`.

    Raises:
        UserError: a folder that is not supported or damaged, no tokenizer, or an `out` that is something else.
    """
    from data.tokenizer import load_tokenizer
    from model.hf import read_hf
    from model.hf_config import read_config_json

    _check_target(out)
    found, parsed = read_hf(hf), read_config_json(hf)
    words = load_tokenizer(tokenizer or hf)
    if words.vocab_size > found.config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer or hf} has {words.vocab_size} tokens, the model of {hf} only "
            f"{found.config.vocab_size}: give tokenizer=FOLDER of the one it was trained with"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write(found.weights, describe(parsed, str(out), hf), words, temporary, out, shard_bytes)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def describe(parsed: HfConfig, out: str, hf: Path) -> TrainConfig:
    """The configuration of a run whose one stage ended with the folder's length, RoPE and MoBA layers."""
    if parsed.seq_len < 1:
        raise UserError(f"{hf / 'config.json'}: max_position_embeddings is missing: copy the folder again")
    attention = AttentionConfig()
    if moba := parsed.moba:
        try:
            full = [layer for layer in range(parsed.model.num_layers) if layer not in moba["layers"]]
            size, topk = int(moba["block_size"]), int(moba["topk"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{hf / 'config.json'}: the key moba needs block_size, topk and layers") from error
        choose = str(moba.get("choose", "moba"))
        attention = AttentionConfig("moba", block_size=size, topk=topk, choose=choose, full_layers=full)
    stage = StageConfig(parsed.seq_len, parsed.seq_len, 1, rope=StageRopeConfig(**vars(parsed.rope)))
    stage.attention = attention
    config = TrainConfig(out=out, model=parsed.model, stages={STAGE: stage})
    config.init.hf = str(hf)
    return config


def _write(
    weights: HfWeights, config: TrainConfig, words: Tokenizer, temporary: Path, out: Path, shard_bytes: int
) -> None:
    from train.checkpoint import Entries, commit, write_tensors
    from train.state import TrainState

    entries: Entries = {}
    held: dict[str, Any] = {}

    def flush() -> None:
        if held:
            name = f"weights-{len(entries):05d}.safetensors"
            entries.update(write_tensors(temporary, name, held))
            held.clear()

    for name, tensor in weights:
        if sum(one.nbytes for one in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
    flush()
    with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=".tmp-") as folder:
        words.save(Path(folder))
        commit(temporary, out, entries, TrainState(STAGE, stage_done=True), config, Path(folder))


def _check_target(out: Path) -> None:
    """Refuse a target that holds something else than an earlier import."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out={out} is not a folder: choose another")
    if out.is_dir() and any(out.iterdir()) and not CheckpointPaths(out).manifest.is_file():
        raise UserError(f"out={out} holds something else than a checkpoint: choose another folder")


COMMAND = Command(
    name="import",
    summary="write a Hugging Face folder as a checkpoint",
    text="""
Reads Llama, Mistral, Qwen2 and Qwen3 folders (safetensors) tensor by tensor and writes a checkpoint that
init.checkpoint of `moba train`, `moba eval` and `moba export` take. `moba train init.hf=FOLDER` needs no import.
""",
    examples=("moba import hf=models/llama out=runs/llama",),
    resolve=resolve,
    run=run,
)
