"""Hugging Face folders: reading them as our model, writing our model as one.

Parameters carry the same names on both sides (`model.shapes`), so what is left is the configuration
(`model.hf_config`), the head of tied models, and buffers that old folders carry along.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.constants import GENERATION_FILE
from conf.errors import UserError
from conf.inherit import reach, stage_ropes
from conf.load import load_train_config
from conf.paths import CheckpointPaths
from conf.schema import ModelConfig, RopeConfig, TrainConfig
from model.hf_config import check_family, read_config_json, to_config_json
from model.hf_tokenizer import compare_tokenizers, copy_tokenizer, generation_settings
from model.schedule import plan
from model.shapes import HEAD, parameter_shapes
from model.weights import TensorFiles, check_names, checkpoint_tensors, find_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9  # as transformers splits; one shard is held in memory while writing

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HfWeights:
    """Tensors of a folder under our names, in the folder's dtype, read one at a time."""

    def __init__(self, files: TensorFiles, names: list[str]) -> None:
        self._files, self._names = files, names

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._names:
            yield name, self._files[name]

    def __len__(self) -> int:
        return len(self._names)


class HfModel(NamedTuple):
    """A folder, checked but not loaded: shape, position embedding and a stream of (name, tensor)."""

    config: ModelConfig
    rope: RopeConfig
    weights: HfWeights


def read_hf(folder: Path) -> HfModel:
    """Open a Hugging Face folder. Every name and shape is checked here; tensors are read while iterating.

    Raises:
        UserError: unsupported architecture or option; missing, extra or misshapen tensors; truncated files.
    """
    parsed = read_config_json(folder)
    files = TensorFiles(_tensor_paths(folder))
    expected = parameter_shapes(parsed.model)
    found = {name: shape for name, shape in files.shapes.items() if not _ignored(name, parsed.model)}
    check_names(found, expected, str(folder))
    return HfModel(parsed.model, parsed.rope, HfWeights(files, list(expected)))


def _ignored(name: str, config: ModelConfig) -> bool:
    # Buffers that Llama folders of 2023 still carry, and the copy of a tied head that some folders hold.
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_embeddings and name == HEAD)


def _tensor_paths(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error!r}): copy it again") from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise UserError(f"{index} names {outside[0]!r}, which is no file of the folder: copy it again")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickles = any(folder.glob("*.bin"))
    old = " (*.bin files are pickles and are not read: save with safe_serialization)" if pickles else ""
    raise UserError(f"{folder} holds neither {_SINGLE} nor {_INDEX}{old}")


def export_hf(checkpoint: Path, out: Path, dtype: str) -> Path:
    """Write a training checkpoint as a Hugging Face folder that transformers loads without remote code.

    The stage the checkpoint belongs to gives RoPE, and `conf.inherit.reach` the length. MoBA settings go under the
    extra key `moba`; plain transformers ignores it and runs full attention.

    Args:
        checkpoint: a run folder (its newest checkpoint is taken) or one checkpoint.
        out: the folder to write; an earlier export there is replaced.
        dtype: float32 | bfloat16.

    Returns:
        out.

    Raises:
        UserError: bad input; nothing is written.
    """
    check_target(out, dtype)
    path = find_checkpoint(checkpoint)
    config = load_train_config(CheckpointPaths(path).config)
    name = json.loads(CheckpointPaths(path).state.read_text(encoding="utf-8"))["stage"]
    if name not in config.stages:
        raise UserError(f"{path}: stage {name} of state.json is not in config.yaml: copy the checkpoint again")
    rope = stage_ropes(config.stages)[name]
    description = to_config_json(config.model, rope, seq_len=reach(config, name), dtype=dtype)
    moba = moba_settings(config, name)
    if moba is not None:
        description["moba"] = moba
    write_hf(config.model, description, checkpoint_tensors(path), out, dtype, CheckpointPaths(path).tokenizer)
    return out


def moba_settings(config: TrainConfig, stage: str) -> dict[str, Any] | None:
    """Block size, topk and MoBA layers of the latest stage up to `stage` that trained with MoBA, or None."""
    names = list(config.stages)
    for name in reversed(names[: names.index(stage) + 1]):
        attention = config.stages[name].attention
        if attention.kind == "moba":
            plans = plan(replace(attention, full_after=1.0), config.model.num_layers, 1.0)
            layers = [index for index, layer_plan in enumerate(plans) if layer_plan.kind == "moba"]
            settings = {"block_size": attention.block_size, "topk": attention.topk, "layers": layers}
            return settings if attention.choose == "moba" else {**settings, "choose": attention.choose}
    return None


def check_target(out: Path, dtype: str) -> None:
    """Refuse an unknown dtype, and a target that holds something else than an earlier export."""
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not known: use {' or '.join(DTYPES)}")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out={out} is not a folder: choose another")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UserError(f"out={out} holds something else than an export: choose another folder")


def write_hf(
    model: ModelConfig,
    description: dict[str, Any],
    weights: TensorFiles,
    out: Path,
    dtype: str,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder beside `out` and rename it into place: `out` is never half written.

    Args:
        model: shape; says which tensors there must be.
        description: the config.json, from `to_config_json`.
        weights: tensors under our names, in any order and dtype.
        out, dtype: as in `export_hf`.
        tokenizer: folder whose files are copied, or None.
        shard_bytes: largest safetensors file; a single larger tensor gets a file of its own.
    """
    check_target(out, dtype)
    check_family(model)
    expected = parameter_shapes(model)
    check_names(weights.shapes, expected, "the checkpoint")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        generation: dict[str, Any] = {"do_sample": False}
        if tokenizer is not None:
            tokens = copy_tokenizer(tokenizer, partial)
            description, generation = {**description, **tokens}, generation_settings(partial, tokens)
        _write_shards(expected, weights, partial, DTYPES[dtype], shard_bytes)
        _write_json(partial / GENERATION_FILE, generation)
        _write_json(partial / "config.json", description)
        if tokenizer is not None:
            compare_tokenizers(tokenizer, partial, out)
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
    shapes: dict[str, tuple[int, ...]], weights: TensorFiles, out: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    shards: list[list[str]] = [[]]
    total = filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weights[name].to(dtype).contiguous() for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(out / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, out: Path) -> None:
    """Rename into place. An earlier export is moved aside first: a kill between the two leaves no `out`."""
    if not out.exists():
        partial.rename(out)
        return
    aside = out.with_name(f".old-{out.name}-{os.getpid()}")
    out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside)
