"""The run folder as the launcher sees it: one user at a time, and one configuration for its whole life."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conf.errors import UserError
from conf.load import load_train_config
from conf.paths import RunPaths
from conf.schema import TrainConfig
from launch.stages import Progress

# What may differ from one start of a run to the next: none of it changes what is being trained.
# Processes, ZeRO stage and micro-batches only reorder floating-point sums; a data set that moved is
# recognised by its fingerprint.
ZERO = "engine.zero_stage"
FREE = (
    "out", "max_steps", "dry_run", "resume", "launch", "guard", "metrics", "checkpoint", "eval", "mesh", ZERO,
    "engine.deterministic", "data.workers",
)  # fmt: skip
FREE_IN_STAGE = ("micro_batch", "attention.backend", "data.balance")
# What `resume.allow` can name: parts of a stage, and the optimizer's settings. The rest decides what was trained.
ALLOWED = ("attention", "rope", "lr", "optim")
LOCK_SECONDS = 20.0  # workers of a launcher that was just killed need a moment to leave


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that `resume.allow` lets differ from the run's `config.yaml`."""

    key: str
    before: Any
    now: Any


def check_same(config: TrainConfig, run: RunPaths) -> list[Change]:
    """Refuse to go on with a run whose `config.yaml` trains something else than `config`.

    Without a checkpoint nothing has been trained yet: a first start that was refused may be corrected.

    Returns:
        The differences that `resume.allow` asks for.
    """
    allow = _checked_allow(config)
    if not run.config.is_file() or not any(run.checkpoints.glob("step-*")):
        return []
    saved = load_train_config(run.config)
    if list(saved.stages) != list(config.stages):
        _refuse("stages", list(saved.stages), list(config.stages), run)
    before, now = _flat(saved), _flat(config)
    changes = []
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) == now.get(key) or _is_free(key):
            continue
        if not any(_within(key, one) for one in allow):
            _refuse(key, before.get(key), now.get(key), run)
        changes.append(Change(key, before.get(key), now.get(key)))
    return changes


def check_timely(changes: list[Change], config: TrainConfig, progress: Progress) -> None:
    """Refuse a change to a stage that is over: nothing would come of it but a wrong record."""
    chain = list(config.stages)
    at = chain.index(progress.stage) + progress.stage_done if progress.stage in chain else 0
    for change in changes:
        owner = change.key.split(".")[1]
        if change.key.startswith("stages.") and chain.index(owner) < at:
            raise UserError(f"{change.key}: stage {owner} is over, only later stages can still change")


def record_changes(changes: list[Change], run: RunPaths, progress: Progress) -> None:
    """Append the changes to `changes.jsonl` and say them, before `config.yaml` is replaced."""
    where = {"step": progress.step, "stage": progress.stage}
    with run.changes.open("a", encoding="utf-8") as file:
        for change in changes:
            file.write(json.dumps({**where, **dataclasses.asdict(change)}) + "\n")
            print(f"{run.root} step {progress.step}: {change.key}={change.before} -> {change.now} (resume.allow)")
        file.flush()
        os.fsync(file.fileno())


def _checked_allow(config: TrainConfig) -> list[str]:
    for one in config.resume.allow:
        parts = one.split(".")
        place = ".".join(parts[2:3]) if parts[0] == "stages" else parts[0]
        if place not in ALLOWED:
            raise UserError(
                f"resume.allow=[{one}]: only stages.NAME.attention, .rope, .lr and optim can change within a run"
            )
        if parts[0] == "stages" and parts[1] not in config.stages:
            raise UserError(f"resume.allow=[{one}]: stages has only {', '.join(config.stages)}")
    return list(config.resume.allow)


def _within(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _refuse(key: str, before: Any, now: Any, run: RunPaths) -> None:
    raise UserError(
        f"{run.root} was started with {key}={before}, now {key}={now}: use another out=..., or restore the value"
        + _allow_hint(key)
    )


def _allow_hint(key: str) -> str:
    parts = key.split(".")
    part = ".".join(parts[:3]) if parts[0] == "stages" else parts[0]
    return f", or change it on purpose with resume.allow=[{part}]" if part.split(".")[-1] in ALLOWED else ""


def _is_free(key: str) -> bool:
    parts = key.split(".")
    if parts[0] == "stages" and ".".join(parts[2:]) in FREE_IN_STAGE:
        return True
    if parts[:2] == ["data", "sets"] and parts[-1] == "path":
        return True
    return any(_within(key, free) for free in FREE)


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
