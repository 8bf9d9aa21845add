"""Start the workers of one stage on this machine, pass signals on, wait, return their exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from conf.paths import RunPaths
from conf.schema import LaunchConfig, TrainConfig
from launch.packages import ROOT


def start_stage(config: TrainConfig, run: RunPaths, stage: str, lock: int) -> int:
    """Run `python -m train.run CONFIG STAGE` on `launch.nproc` processes under torchrun, to its end.

    `lock` is the run folder's lock, inherited so that the folder stays taken until the workers are gone.
    Returns 0, the workers' own code (2: bad input), or 128 + N after signal N.
    """
    arguments = worker_command(config.launch.nproc, run, stage)
    # A session of its own: Ctrl-C reaches the workers once, through us, not twice.
    child = subprocess.Popen(arguments, env=worker_env(config.launch), start_new_session=True, pass_fds=(lock,))
    with _forwarding(child) as received:
        code = child.wait()
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def worker_command(nproc: int, run: RunPaths, stage: str) -> list[str]:
    """Rank 0 writes to the terminal; the output of the others goes to `logs/`."""
    # fmt: off
    torchrun = [
        "--standalone", "--max-restarts", "0", "--nproc-per-node", str(nproc), "--log-dir", str(run.logs),
        "--redirects", ",".join(f"{rank}:{3 if rank else 0}" for rank in range(nproc)),  # 3: stdout and stderr
    ]
    # fmt: on
    worker = ["-m", "train.run", str(run.config), stage]
    return [sys.executable, "-m", "launch.elastic", str(run.logs), *torchrun, *worker]


def worker_env(config: LaunchConfig) -> dict[str, str]:
    """Environment of the workers: this process's, with threads, warnings and import paths set."""
    import torch

    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(config.threads or max(1, usable_cores() // config.nproc))
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["PYTHONWARNINGS"] = ",".join(filter(None, (env.get("PYTHONWARNINGS"), "ignore::FutureWarning")))
    # `python -m` would look into the current folder first: a user's own data/ or model/ there must not win.
    env["PYTHONSAFEPATH"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    return env


def usable_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the child's process group; yields the signals received so far."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with suppress(ProcessLookupError):  # gone already
            os.killpg(child.pid, number)

    previous = {sig: signal.signal(sig, forward) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
