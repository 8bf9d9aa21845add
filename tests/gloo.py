"""Persistent gloo worker processes for tests: start-up (imports, rendezvous) is paid once per pool, not per test.

    pool = GlooPool(2)
    results = pool(function, *args)      # [function(*args) on rank 0, on rank 1]; module-level functions only

A call that fails or exceeds its time limit kills the pool's processes and raises; the next call starts afresh.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class WorkerError(AssertionError):
    """A worker raised, died or ran out of time."""


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    import warnings

    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    answer(pipe)


def answer(pipe: Connection) -> None:
    """Do what comes through the pipe, until the end."""
    import torch

    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            torch.distributed.destroy_process_group()
            os._exit(0)  # taking the interpreter apart would cost seconds per worker
        function, args = job
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class GlooPool:
    """`world` processes in one gloo group; the function's results come back in rank order."""

    serve: Callable[..., None] = staticmethod(_serve)

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-")
        store = Path(self._folder.name) / "store"
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=self.serve, args=(rank, self.world, str(store), there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world:
            for rank, pipe in enumerate(self._pipes):
                if rank in results or not pipe.poll(0.02):
                    continue
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    self._processes[rank].join(10)  # the pipe closes a moment before the exit code is known
                    ok, value = False, f"the process died (exit code {self._processes[rank].exitcode})"
                if not ok:
                    self.kill()
                    raise WorkerError(f"rank {rank} of {self.world} in {function.__name__}:\n{value}")
                results[rank] = value
            if time.monotonic() > deadline:
                self.kill()
                silent = sorted(set(range(self.world)) - set(results))
                raise WorkerError(f"{function.__name__}: ranks {silent} gave no answer within {timeout} s")
        return [results[rank] for rank in range(self.world)]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def close(self) -> None:
        """Let the workers leave cleanly; kill what does not."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=10)
        self.kill()
