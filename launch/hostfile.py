"""`launch=hostfile`: the workers of several machines over ssh, one torchrun on each.

The machines share the run folder and this installation, and can be reached by ssh without a password. Standard
input of each ssh is the control line of `launch.node`: signals travel on it, and its end stops the far side.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from conf.constants import EXIT_DIVERGED, EXIT_REQUEUE, EXIT_STALLED, EXIT_USER_ERROR
from conf.errors import UserError
from conf.load import save_config
from conf.paths import RunPaths
from conf.schema import LaunchConfig, TrainConfig
from launch.packages import ROOT
from launch.snapshot import with_absolute_paths

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\s+slots=(\d+))?")  # no name can be taken for an option of ssh
_TELLING = (EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_STALLED, EXIT_REQUEUE)  # codes that say more than "failed"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
# Of this machine's environment, what the others get too: networks and threads. No secrets: all can read a command.
_KEPT, _KEPT_PREFIXES = ("OMP_NUM_THREADS", "DS_ACCELERATOR"), ("NCCL_", "GLOO_", "UCX_", "FI_")
LEAVE_SECONDS = 60.0  # for the other machines, once one has failed


def read_hosts(launch: LaunchConfig) -> list[str]:
    """The machines a run uses: the first `launch.nodes` of the file. Raises UserError."""
    path = Path(launch.hostfile)
    if not launch.hostfile or not path.is_file():
        raise UserError(
            f"launch.hostfile={launch.hostfile or '(empty)'} is no file: give one of `HOST slots=N` lines"
        )
    hosts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise UserError(f"{path} line {number}: {text[:60]!r} is not `HOST slots=N`")
        if found[2] is not None and int(found[2]) < launch.nproc:
            raise UserError(f"{path} line {number}: {found[1]} has {found[2]} slots, launch.nproc={launch.nproc}")
        hosts.append(found[1])
    if len(hosts) < launch.nodes:
        raise UserError(f"{path} names {len(hosts)} hosts, launch.nodes={launch.nodes}: use at most {len(hosts)}")
    return hosts[: launch.nodes]


def start_stage(config: TrainConfig, run: RunPaths, stage: str, hosts: list[str]) -> int:
    """Run a stage on all hosts to its end. Returns 0, the code that tells most, or that of the first to fail."""
    master, settings = f"{hosts[0]}:{config.launch.port}", run.root.resolve() / "hostfile.yaml"
    save_config(with_absolute_paths(config), settings, comment="what the machines read, with absolute paths")
    started = [
        subprocess.Popen(remote_command(host, settings, stage, rank, master), stdin=subprocess.PIPE, text=True,
                         start_new_session=True)
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    with _forwarding(started):
        codes = _wait(started)
    for code in _TELLING:
        if code in codes:
            return code
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def remote_command(host: str, settings: Path, stage: str, rank: int, master: str) -> list[str]:
    """What runs on `host`. ssh hands one string to the shell there, so every part of it is quoted."""
    node = [sys.executable, "-m", "launch.node", str(settings), stage, str(rank), master, "--control"]
    there = ["cd", str(ROOT), "&&", "exec", "env", "PYTHONUNBUFFERED=1"]
    keep = [
        f"{key}={value}" for key, value in os.environ.items() if key in _KEPT or key.startswith(_KEPT_PREFIXES)
    ]
    text = " ".join(part if part == "&&" else shlex.quote(part) for part in [*there, *keep, *node])
    return [*SSH, host, text]


def _wait(started: list[subprocess.Popen[str]]) -> list[int]:
    """Exit codes, in the order of failing first. When one machine fails, the others are told to leave."""
    ended: dict[int, int] = {}
    deadline = float("inf")
    while len(ended) < len(started):
        for rank, process in enumerate(started):
            if rank not in ended and (code := process.poll()) is not None:
                ended[rank] = code
                if code and deadline == float("inf"):
                    deadline = time.monotonic() + LEAVE_SECONDS
        if time.monotonic() > deadline - LEAVE_SECONDS / 2:
            _tell(started, "SIGTERM")
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.1)
    return list(ended.values())


def _tell(started: list[subprocess.Popen[str]], name: str) -> None:
    for process in started:
        if process.poll() is None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.write(f"{name}\n")
                process.stdin.flush()


@contextmanager
def _forwarding(started: list[subprocess.Popen[str]]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        _tell(started, signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
