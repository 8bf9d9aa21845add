"""Atomic checkpoints that any world size and ZeRO stage can load.

A folder `step-00000120` holds `weights-*.safetensors` (fp32 master weights under the model's names),
`optim-*.safetensors` (`exp_avg.<name>`, `exp_avg_sq.<name>`), `state.json`, `config.yaml`, `tokenizer/` and,
written last, `manifest.json` with the size and SHA-256 of all the others. It is built under a `.tmp-` name and
renamed when complete: a kill at any moment leaves the previous checkpoint the newest one.

Ranks share the writing. Parameters are dealt out to shards by a rule every rank computes alike; in each round
every rank receives one shard, parameter by parameter, then all write at once. Host memory holds one shard.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from conf.load import save_config
from conf.paths import CheckpointPaths, checkpoint_name
from conf.schema import TrainConfig
from model.weights import TensorFiles, read_weights, verify_checkpoint
from train.engine import DeepSpeedEngine
from train.files import remove_folder, sync_folder, write_durably
from train.mesh import Mesh
from train.state import (
    MOMENTS,
    WEIGHT,
    TrainState,
    full_shape,
    get_full,
    named_parameters,
    optimizer_step,
    put_full,
    put_weights,
    reset_optimizer,
)

VERSION = 1
SHARD_BYTES = 256 * 2**20  # of weights; a rank holds three times as much (two moments) while it writes
Entries = dict[str, dict[str, object]]  # manifest lines


class SaveError(RuntimeError):
    """A checkpoint could not be written (disk full, no permission). The previous ones are intact."""


def plan_shards(sizes: dict[str, int], world: int, limit: int = SHARD_BYTES) -> list[list[str]]:
    """Deal parameters (name -> bytes) out to shards, in order: none above `limit` unless one parameter is.

    Small models still give each of `world` ranks about one shard to write.
    """
    limit = min(limit, -(-sum(sizes.values()) // world))
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def save_checkpoint(
    checkpoints: Path, engine: DeepSpeedEngine, state: TrainState, config: TrainConfig, tokenizer: Path, mesh: Mesh
) -> Path:
    """Write the checkpoint of `state.step` and make it the newest one. Collective.

    Raises:
        SaveError: on every rank alike, when any of them could not write.
    """
    final = checkpoints / checkpoint_name(state.step)
    temporary = checkpoints / f".tmp-{final.name}"
    state.optimizer_step = optimizer_step(engine)
    _together(mesh, lambda: _fresh_folder(temporary) if mesh.is_main else None)
    entries: Entries = {}
    for part in _together(mesh, lambda: _write_shards(temporary, engine, mesh)):
        entries.update(part)
    _together(mesh, lambda: commit(temporary, final, entries, state, config, tokenizer) if mesh.is_main else None)
    return final


def _together(mesh: Mesh, work: Any) -> list[Any]:
    """Every rank does `work()`; results in rank order. One rank's I/O error becomes everybody's SaveError."""
    result, error = None, None
    try:
        result = work()
    except OSError as caught:
        error = f"{caught.strerror or caught} ({caught.filename or 'checkpoint'})"
    answers = mesh.gather((result, error))
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
    if errors:
        raise SaveError(f"checkpoint not written: {errors[0]}; the previous checkpoint is untouched")
    return [result for result, _ in answers]


def _fresh_folder(path: Path) -> None:
    for leftover in path.parent.glob(".tmp-*"):
        remove_folder(leftover)
    path.mkdir(parents=True)


def _write_shards(folder: Path, engine: DeepSpeedEngine, mesh: Mesh) -> Entries:
    """This rank's share of the tensor files. Goes through every collective even after a failed write."""
    if not optimizer_step(engine):
        reset_optimizer(engine, 0)  # saved before the first step: the moments do not exist yet
    params = dict(named_parameters(engine))
    shards = plan_shards({name: 4 * full_shape(param).numel() for name, param in params.items()}, mesh.world)
    entries: Entries = {}
    failure: OSError | None = None
    for first in range(0, len(shards), mesh.world):
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for owner, names in enumerate(shards[first : first + mesh.world]):
            for name in names:
                for key in (WEIGHT, *MOMENTS):
                    full = get_full(engine, params[name], key)
                    if owner == mesh.rank and key == WEIGHT:
                        weights[name] = _host_copy(full)
                    elif owner == mesh.rank:
                        moments[f"{key}.{name}"] = _host_copy(full)
        if weights and failure is None:
            index = first + mesh.rank
            try:
                entries |= write_tensors(folder, f"weights-{index:05d}.safetensors", weights)
                entries |= write_tensors(folder, f"optim-{index:05d}.safetensors", moments)
            except OSError as caught:
                failure = caught
    if failure is not None:
        raise failure
    return entries


def _host_copy(full: Tensor) -> Tensor:
    return full.detach().to("cpu", torch.float32, copy=True).contiguous()


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> Entries:
    """Write one safetensors file durably; returns its manifest line. Holds the tensors twice for a moment."""
    from safetensors.torch import save

    return write_durably(folder, name, save(tensors, metadata={"format": "pt"}))


def commit(
    temporary: Path, final: Path, entries: Entries, state: TrainState, config: TrainConfig, tokenizer: Path
) -> None:
    """One process, after all tensor files lie in `temporary`: the small files, the manifest, the rename to `final`.

    `entries`: manifest lines of the tensor files. `tokenizer`: folder that is copied.
    """
    for name, entry in entries.items():
        if (temporary / name).stat().st_size != entry["bytes"]:
            raise OSError(f"{name} is not {entry['bytes']} bytes long on the disk")
    paths = CheckpointPaths(temporary)
    entries |= write_durably(temporary, paths.state.name, json.dumps(state.to_json(), indent=1).encode())
    save_config(config, paths.config)
    entries |= write_durably(temporary, paths.config.name, paths.config.read_bytes())
    for file in sorted(path for path in tokenizer.rglob("*") if path.is_file()):
        name = (Path(paths.tokenizer.name) / file.relative_to(tokenizer)).as_posix()
        entries |= write_durably(temporary, name, file.read_bytes())
    manifest = {"version": VERSION, "files": dict(sorted(entries.items()))}
    write_durably(temporary, paths.manifest.name, json.dumps(manifest, indent=1).encode())
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync_folder(folder)
    replaced = final.with_name(f".tmp-replaced-{final.name}")
    if final.exists():  # saved twice at one step: the older copy goes when the newer one stands
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    remove_folder(replaced)


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first, valid or not."""
    return sorted(path for path in checkpoints.glob("step-*") if path.is_dir())


def read_state(checkpoint: Path) -> TrainState:
    path = CheckpointPaths(checkpoint).state
    return TrainState.from_json(json.loads(path.read_text()), str(path))


def newest_valid(checkpoints: Path, mesh: Mesh) -> Path | None:
    """The newest checkpoint whose files all have the manifest's sizes and checksums; None: there is none at all.

    Damaged ones are renamed to `.invalid-...` and reported. Collective; rank 0 does the reading.

    Raises:
        UserError: there are checkpoints, but not one is valid. Starting afresh must be the user's decision.
    """
    found: str | None = None
    problem = ""
    if mesh.is_main:
        folders = checkpoint_folders(checkpoints)
        for folder in reversed(folders):
            try:
                verify_checkpoint(folder)
            except (UserError, OSError) as error:
                aside = folder.with_name(f".invalid-{folder.name}")
                remove_folder(aside)
                folder.rename(aside)
                print(f"WARNING: checkpoint {folder.name} is damaged: {error}", file=sys.stderr)
                print(f"WARNING: it is now {aside.name}; trying the one before it", file=sys.stderr, flush=True)
                continue
            found = str(folder)
            break
        if folders and found is None:
            problem = f"{checkpoints}: no checkpoint is valid; move the folder away to start from scratch"
    found, problem = mesh.broadcast((found, problem))
    if problem:
        raise UserError(problem)
    return None if found is None else Path(found)


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the last one of every finished stage. One rank only."""
    for folder in checkpoint_folders(checkpoints)[: -max(keep, 1)]:
        if not read_state(folder).stage_done:
            remove_folder(folder)


def load_engine(engine: DeepSpeedEngine, checkpoint: Path, *, with_optimizer: bool) -> None:
    """Restore the fp32 master weights and, if asked, AdamW; else AdamW starts anew. Verified before."""
    put_weights(engine, read_weights(checkpoint))
    if not with_optimizer:
        reset_optimizer(engine, 0)
        return
    reset_optimizer(engine, read_state(checkpoint).optimizer_step)
    missing = {f"{key}.{name}" for name, _ in named_parameters(engine) for key in MOMENTS}
    params = dict(named_parameters(engine))
    for name, value in TensorFiles(sorted(checkpoint.glob("optim-*.safetensors"))):
        key, _, param = name.partition(".")
        missing.discard(name)
        put_full(engine, params[param], key, value)
    if missing:
        raise UserError(f"{checkpoint}: no {sorted(missing)[0]} and {len(missing) - 1} other optimizer states")
