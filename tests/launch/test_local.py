"""Starting workers: command, environment, exit codes and signals, with small stand-ins for `train.run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.paths import RunPaths
from conf.schema import LaunchConfig, TrainConfig
from launch import local
from launch.local import start_stage, worker_command, worker_env
from launch.packages import ROOT


def test_command_is_an_argument_list(tmp_path: Path) -> None:
    command = worker_command(2, RunPaths(tmp_path), "long")
    assert command[:3] == [sys.executable, "-m", "launch.elastic"]
    assert command[-4:] == ["-m", "train.run", str(tmp_path / "config.yaml"), "long"]
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[command.index("--redirects") + 1] == "0:0,1:3"  # rank 0 keeps the terminal


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 9)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    env = worker_env(LaunchConfig(nproc=2))
    assert env["OMP_NUM_THREADS"] == "4" and env["DS_ACCELERATOR"] == "cpu"
    assert env["TOKENIZERS_PARALLELISM"] == "false" and "ignore::FutureWarning" in env["PYTHONWARNINGS"]
    assert env["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/mine"]
    assert worker_env(LaunchConfig(nproc=16))["OMP_NUM_THREADS"] == "1"
    assert worker_env(LaunchConfig(nproc=2, threads=3))["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert "DS_ACCELERATOR" not in worker_env(LaunchConfig(nproc=2))


WORKER = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
how = sys.argv[1]
if how == "refuse":
    if rank: time.sleep(1.0)  # as train.run.complain_once
    print("error: told by one rank", file=sys.stderr)
    sys.exit(2)
if how == "refuse-1":
    if rank == 1:
        print("error: told by rank 1", file=sys.stderr)
        sys.exit(2)
    time.sleep(60)
if how == "stopped": sys.exit(75)
if how == "crash":
    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "code", "wanted"),
    [
        ("refuse", 2, "error: told by one rank\n"),
        ("refuse-1", 2, "error: told by rank 1\n"),
        ("stopped", 75, ""),
        ("crash", 1, "error: worker rank 1 was killed by signal 9; its output is in "),
    ],
)
def test_exit_codes_come_through_torchrun(how: str, code: int, wanted: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    command = worker_command(2, RunPaths(tmp_path), how)
    command = [*command[: command.index("train.run") - 1], str(script), how]
    done = subprocess.run(
        command, cwd=tmp_path, env=worker_env(LaunchConfig(nproc=2)), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(wanted) and done.stderr.count("\n") == bool(wanted), done.stderr
    if how == "crash":
        assert Path(done.stderr.split(" is in ")[1].strip()).is_file()


CHILD = """
import signal, sys, time
def leave(number, frame):
    print("got", number, flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGTERM, leave)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready"
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    monkeypatch.setattr(local, "worker_command", lambda *_: [sys.executable, str(script), str(ready)])
    # another process signals this one once the child listens
    sender = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, time, pathlib\nwhile not pathlib.Path({str(ready)!r}).exists(): time.sleep(0.05)\n"
            f"os.kill({os.getpid()}, {int(number)})",
        ]
    )
    before = signal.getsignal(number)
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    start = time.monotonic()
    code = start_stage(TrainConfig(out=str(tmp_path)), RunPaths(tmp_path), "a", lock)
    os.close(lock)
    assert code == 128 + number and time.monotonic() - start < 50
    assert signal.getsignal(number) is before
    assert sender.wait(10) == 0


def test_workers_follow_a_killed_launcher(tmp_path: Path) -> None:
    """SIGKILL of the parent ends a process that called `follow_parent`."""
    pid_file = tmp_path / "pid"
    child = (
        "import os, sys, time; from conf.process import follow_parent; follow_parent(); "
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    launcher = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    launcher.kill()
    launcher.wait()
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or _state(pid) == "Z"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"
