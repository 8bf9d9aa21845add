"""Checkpoints written while training goes on: copied to host memory between two steps, to the disk after that.

A save goes through three states, which all ranks change alike:

    idle -> writing        `save`: this rank's shards are copied, a thread writes and hashes them
    writing -> committing  `advance`: a step's sums say that no rank's thread is busy; manifest lines are gathered,
                           and a thread of rank 0 writes the manifest and renames the folder
    committing -> idle     `wait`, at the next save and at the end

Threads take part in no collective: whether they are done travels with the sums that every step reduces anyway. A
kill at any moment leaves a `.tmp-` folder, which the next save removes, and the checkpoint before it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from conf.paths import checkpoint_name
from conf.schema import TrainConfig
from train.checkpoint import Entries, begin, commit, prune, save_checkpoint, together, write_shard
from train.engine import DeepSpeedEngine
from train.mesh import Mesh
from train.shards import collect_shards
from train.state import TrainState

T = TypeVar("T")
Shard = tuple[int, dict[str, Tensor], dict[str, Tensor]]  # number, weights, moments; on the host


class Saver:
    """Saves the checkpoints of one stage. All methods but `status` are collective."""

    def __init__(
        self, checkpoints: Path, engine: DeepSpeedEngine, config: TrainConfig, tokenizer: Path, mesh: Mesh
    ) -> None:
        """`tokenizer`: folder that each checkpoint gets a copy of. `config.checkpoint` says how to save."""
        self._checkpoints, self._engine, self._config = checkpoints, engine, config
        self._tokenizer, self._mesh = tokenizer, mesh
        self._buffers: dict[str, Tensor] = {}  # kept from save to save: fresh (pinned) memory is slow
        self._target: Path | None = None  # of the save under way
        self._state = TrainState("")  # as it was at the save
        self._writing: Future[Entries] | None = None  # this rank's thread, until its lines are gathered
        self._committing: Future[None] | None = None  # rank 0's thread; on other ranks a finished one

    def save(self, state: TrainState) -> None:
        """Take the checkpoint of `state`. With `checkpoint.background` it stands only after `wait`.

        Raises:
            SaveError: on every rank alike, also for a save that began earlier and could not be finished.
        """
        self.wait()
        if not self._config.checkpoint.background:
            save_checkpoint(self._checkpoints, self._engine, state, self._config, self._tokenizer, self._mesh)
            if self._mesh.is_main:
                prune(self._checkpoints, self._config.checkpoint.keep)
            return
        self._target = self._checkpoints / checkpoint_name(state.step)
        temporary = begin(self._target, self._engine, state, self._mesh)
        self._state = replace(state, recent=list(state.recent))
        shards: list[Shard] = []
        collect_shards(self._engine, self._mesh, self._copy, lambda *shard: shards.append(shard))
        if self._mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._writing = in_background(lambda: _write(temporary, shards))

    def status(self) -> tuple[float, float]:
        """(1 if a thread of this rank is at work, 1 if one has failed), to be summed over ranks. Local."""
        futures = [future for future in (self._writing, self._committing) if future is not None]
        busy = any(not future.done() for future in futures)
        failed = any(future.done() and future.exception() is not None for future in futures)
        return float(busy), float(failed)

    def advance(self, busy: float, failed: float) -> None:
        """Go on with the save under way, given the sums of `status` over the ranks since it began.

        Raises:
            SaveError: as `save`.
        """
        if failed:
            self.wait()
        elif not busy and self._writing is not None:
            self._commit()

    def wait(self) -> None:
        """Return when nothing is left to write.

        Raises:
            SaveError: as `save`.
        """
        try:
            if self._writing is not None:
                self._commit()
            if self._committing is not None:
                together(self._mesh, self._committing.result)
        finally:
            self._writing = self._committing = None

    def _commit(self) -> None:
        assert self._writing is not None and self._target is not None
        entries: Entries = {}
        for part in together(self._mesh, self._writing.result):
            entries.update(part)
        self._writing, self._committing = None, done()
        if self._mesh.is_main:
            target, state = self._target, self._state
            self._committing = in_background(lambda: self._finish(target, entries, state))

    def _finish(self, target: Path, entries: Entries, state: TrainState) -> None:
        temporary = target.with_name(f".tmp-{target.name}")
        commit(temporary, target, entries, state, self._config, self._tokenizer)
        prune(self._checkpoints, self._config.checkpoint.keep)

    def _copy(self, key: str, full: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            pinned = full.device.type == "cuda"
            buffer = torch.empty(full.shape, dtype=torch.float32, pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer.copy_(full.detach(), non_blocking=True)


def _write(folder: Path, shards: list[Shard]) -> Entries:
    entries: Entries = {}
    for index, weights, moments in shards:
        entries |= write_shard(folder, index, weights, moments)
    return entries


def in_background(work: Callable[[], T]) -> Future[T]:
    """`work()` in a thread that does not keep a failing process alive, and gives way to training."""
    future: Future[T] = Future()

    def run() -> None:
        if sys.platform == "linux":  # where this is of the thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def done() -> Future[None]:
    """A future that is over."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
