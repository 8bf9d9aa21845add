"""The run folder as the launcher sees it: one user at a time, and one configuration for its whole life."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conf.errors import UserError
from conf.load import load_train_config
from conf.paths import RunPaths
from conf.schema import TrainConfig

# What may differ from one start of a run to the next: none of it changes what is being trained.
# Processes, ZeRO stage and micro-batches only reorder floating-point sums; a data set that moved is
# recognised by its fingerprint.
FREE = ("out", "max_steps", "dry_run", "launch", "metrics", "checkpoint", "eval", "mesh", "engine.zero_stage")
FREE_IN_STAGE = ("micro_batch", "attention.backend")
LOCK_SECONDS = 20.0  # workers of a launcher that was just killed need a moment to leave


def check_same(config: TrainConfig, run: RunPaths) -> None:
    """Refuse to go on with a run whose `config.yaml` trains something else than `config`.

    Without a checkpoint nothing has been trained yet: a first start that was refused may be corrected.
    """
    if not run.config.is_file() or not any(run.checkpoints.glob("step-*")):
        return
    before, now = _flat(load_train_config(run.config)), _flat(config)
    order_before = [key.split(".")[1] for key in before if key.endswith(".seq_len")]
    order_now = [key.split(".")[1] for key in now if key.endswith(".seq_len")]
    if order_before != order_now:
        _refuse("stages", order_before, order_now, run)
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key) and not _is_free(key):
            _refuse(key, before.get(key), now.get(key), run)


def _refuse(key: str, before: Any, now: Any, run: RunPaths) -> None:
    raise UserError(
        f"{run.root} was started with {key}={before}, now {key}={now}: use another out=..., or restore the value"
    )


def _is_free(key: str) -> bool:
    parts = key.split(".")
    if parts[0] == "stages" and ".".join(parts[2:]) in FREE_IN_STAGE:
        return True
    if parts[:2] == ["data", "sets"] and parts[-1] == "path":
        return True
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf."""
    if dataclasses.is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, dict) and value:
        items = value
    else:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, item in items.items() for key, leaf in _flat(item, f"{prefix}{name}.").items()}


@contextmanager
def run_lock(run: RunPaths) -> Iterator[int]:
    """Hold the run folder; yields the lock's file descriptor, which children may inherit to hold it too.

    Raises UserError when another process still holds it after LOCK_SECONDS.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise UserError(
                    f"out={run.root} is in use by another moba train: wait for it, or use another out=..."
                )
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
