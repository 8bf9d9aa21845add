"""Start the workers of one stage on this machine, pass signals on, wait, return their exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from conf.paths import RunPaths
from conf.schema import LaunchConfig, TrainConfig
from launch.packages import ROOT


def start_stage(config: TrainConfig, run: RunPaths, stage: str, lock: int) -> int:
    """Run `python -m train.run CONFIG STAGE` on `launch.nproc` processes under torchrun, to its end.

    `lock` is the run folder's lock, inherited so that the folder stays taken until the workers are gone.
    Returns 0, the workers' own code (2: bad input), or 128 + N after signal N.
    """
    return start_workers(worker_command(config.launch.nproc, run, stage), config.launch, (lock,))


def start_workers(command: list[str], config: LaunchConfig, pass_fds: tuple[int, ...] = ()) -> int:
    """Run `command` (of `torchrun_command`) to its end, passing signals on. Codes as for `start_stage`."""
    # A session of its own: Ctrl-C reaches the workers once, through us, not twice.
    child = subprocess.Popen(command, env=worker_env(config), start_new_session=True, pass_fds=pass_fds)
    with _forwarding(child) as received:
        code = child.wait()
    if received and code == 0:
        return 128 + received[0]  # nobody minded it: but whoever sent it wants no next stage
    return code if code >= 0 else 128 - code


def worker_command(nproc: int, run: RunPaths, stage: str) -> list[str]:
    """The workers of a stage."""
    return torchrun_command(nproc, run.logs, "train.run", str(run.config), stage)


def torchrun_command(
    nproc: int, logs: Path, module: str, *arguments: str, nodes: int = 1, node_rank: int = 0, master: str = ""
) -> list[str]:
    """`python -m MODULE ARGUMENTS` on `nproc` ranks. Rank 0 writes to the terminal, the others into `logs`.

    On several machines the ranks meet at `master`, HOST:PORT of the first; the first rank of each writes to its
    terminal, and each machine has a folder of logs of its own.
    """
    meet = ["--standalone"]
    if nodes > 1:
        host, _, port = master.rpartition(":")
        meet = ["--nnodes", str(nodes), "--node-rank", str(node_rank)]
        meet += ["--master-addr", host, "--master-port", port]
        logs = logs / f"node-{node_rank}"
    # fmt: off
    torchrun = [
        *meet, "--max-restarts", "0", "--nproc-per-node", str(nproc), "--log-dir", str(logs),
        "--redirects", ",".join(f"{rank}:{3 if rank else 0}" for rank in range(nproc)),  # 3: stdout and stderr
    ]
    # fmt: on
    return [sys.executable, "-m", "launch.elastic", str(logs), *torchrun, "-m", module, *arguments]


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
    """Pass SIGINT, SIGTERM and SIGUSR1 on to the child's process group; yields the signals received so far."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with suppress(ProcessLookupError):  # gone already
            os.killpg(child.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {sig: signal.signal(sig, forward) for sig in numbers}
    try:
        yield received
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
