"""Atomic checkpoints that any world size and ZeRO stage can load.

A folder `step-00000120` holds `weights-*.safetensors` (fp32 master weights under the model's names),
`optim-*.safetensors` (`exp_avg.<name>`, `exp_avg_sq.<name>`), `state.json`, `config.yaml`, `tokenizer/` and,
written last, `manifest.json` with the size and SHA-256 of all the others. It is built under a `.tmp-` name and
renamed when complete: a kill at any moment leaves the previous checkpoint the newest one.

Ranks share the writing, see `train.shards`. `save_checkpoint` writes shard by shard and holds one in host memory;
`train.saver` keeps a rank's shards and writes them while training goes on. `train.restore` checks and reads.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.load import save_config
from conf.paths import CheckpointPaths, checkpoint_name
from conf.schema import TrainConfig
from train.engine import DeepSpeedEngine
from train.files import SaveError as SaveError
from train.files import remove_folder, safetensors_parts, sync_folder, write_durably
from train.mesh import Mesh
from train.restore import checkpoint_folders, read_state
from train.shards import collect_shards
from train.state import TrainState, optimizer_step

VERSION = 1
Entries = dict[str, dict[str, object]]  # manifest lines


def save_checkpoint(
    checkpoints: Path, engine: DeepSpeedEngine, state: TrainState, config: TrainConfig, tokenizer: Path, mesh: Mesh
) -> Path:
    """Write the checkpoint of `state.step` and make it the newest one. Collective.

    Raises:
        SaveError: on every rank alike, when any of them could not write.
    """
    final = checkpoints / checkpoint_name(state.step)
    temporary = begin(final, engine, state, mesh)
    entries: Entries = {}
    for part in together(mesh, lambda: _write_shards(temporary, engine, mesh)):
        entries.update(part)
    together(mesh, lambda: commit(temporary, final, entries, state, config, tokenizer) if mesh.is_main else None)
    return final


def begin(final: Path, engine: DeepSpeedEngine, state: TrainState, mesh: Mesh) -> Path:
    """The empty folder in which the checkpoint `final` will be built; leftovers of others go. Collective."""
    temporary = final.with_name(f".tmp-{final.name}")
    state.optimizer_step = optimizer_step(engine)
    together(mesh, lambda: _fresh_folder(temporary) if mesh.is_main else None)
    return temporary


def together(mesh: Mesh, work: Any) -> list[Any]:
    """Every rank does `work()`; results in rank order. One rank's error becomes everybody's SaveError."""
    result, error = None, None
    try:
        result = work()
    except OSError as caught:
        error = f"{caught.strerror or caught} ({caught.filename or 'checkpoint'})"
    except Exception as caught:  # the others wait for this rank's answer: they must hear of any failure
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
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
    entries: Entries = {}
    failures: list[OSError] = []

    def write(index: int, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        try:
            if not failures:
                entries.update(write_shard(folder, index, weights, moments))
        except OSError as caught:
            failures.append(caught)

    collect_shards(engine, mesh, _host_copy, write)
    if failures:
        raise failures[0]
    return entries


def _host_copy(key: str, full: Tensor) -> Tensor:
    return full.detach().to("cpu", torch.float32, copy=True).contiguous()


def write_shard(folder: Path, index: int, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> Entries:
    """The two files of one shard, durably; returns their manifest lines."""
    entries = write_tensors(folder, f"weights-{index:05d}.safetensors", weights)
    return entries | write_tensors(folder, f"optim-{index:05d}.safetensors", moments)


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> Entries:
    """Write one safetensors file durably, straight from the tensors; returns its manifest line."""
    return write_durably(folder, name, *safetensors_parts(tensors))


def commit(
    temporary: Path, final: Path, entries: Entries, state: TrainState, config: TrainConfig, tokenizer: Path
) -> None:
    """One process, when all tensor files lie in `temporary`: the small files, the manifest, the rename to `final`.

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


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the last one of every finished stage. One rank only."""
    for folder in checkpoint_folders(checkpoints)[: -max(keep, 1)]:
        if not read_state(folder).stage_done:
            remove_folder(folder)
