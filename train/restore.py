"""Checkpoints found, checked and read back, at any world size and ZeRO stage.

`train.checkpoint` says what lies in one. Checking is shared by the ranks: each reads and hashes its share.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conf.errors import UserError
from conf.paths import CheckpointPaths
from model.weights import TensorFiles, read_weights, verify_checkpoint
from train.engine import DeepSpeedEngine
from train.files import remove_folder
from train.mesh import Mesh
from train.state import MOMENTS, TrainState, named_parameters, put_full, put_weights, reset_optimizer


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first, valid or not."""
    return sorted(path for path in checkpoints.glob("step-*") if path.is_dir())


def read_state(checkpoint: Path) -> TrainState:
    path = CheckpointPaths(checkpoint).state
    return TrainState.from_json(json.loads(path.read_text()), str(path))


def newest_valid(checkpoints: Path, mesh: Mesh) -> Path | None:
    """The newest checkpoint whose files all have the manifest's sizes and checksums; None: there is none at all.

    Damaged ones are renamed to `.invalid-...` and reported. Collective; every rank reads and hashes its share.

    Raises:
        UserError: there are checkpoints, but not one is valid. Starting afresh must be the user's decision.
    """
    names = mesh.broadcast([path.name for path in checkpoint_folders(checkpoints)] if mesh.is_main else None)
    for name in reversed(names):
        error = _damage(checkpoints / name, mesh)
        if not error:
            return checkpoints / name
        if mesh.is_main:
            aside = checkpoints / f".invalid-{name}"
            remove_folder(aside)
            (checkpoints / name).rename(aside)
            print(f"WARNING: checkpoint {name} is damaged: {error}", file=sys.stderr)
            print(f"WARNING: it is now {aside.name}; trying the one before it", file=sys.stderr, flush=True)
    if names:
        raise UserError(f"{checkpoints}: no checkpoint is valid; move the folder away to start from scratch")
    return None


def _damage(checkpoint: Path, mesh: Mesh) -> str:
    """What is wrong with a checkpoint, the same on every rank; empty: nothing. Collective."""
    error = ""
    try:
        verify_checkpoint(checkpoint, share=slice(mesh.rank, None, mesh.world))
    except (UserError, OSError) as caught:
        error = str(caught)
    return next(filter(None, mesh.gather(error)), "")


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
