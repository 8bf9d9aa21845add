"""A SLURM of one machine for tests: its own munge, controller and node, in a folder of their own, ended by pid.

Nothing of a cluster that the machine may belong to is used or touched: other ports, another socket and key.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# cred_expire is also how long a requeued job waits before it starts again.
CONF = """
ClusterName=longmoba
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=3600
MailProg=/bin/true
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Why no SLURM can be started here; empty: it can."""
    if os.geteuid():
        return "starting a SLURM needs root"
    absent = [name for name in TOOLS if _tool(name) is None]
    return f"no {absent[0]} here: `make cluster-tools` installs SLURM from Debian's packages" if absent else ""


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The running SLURM; `env` is the environment in which its commands find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)

    def wait_for(self, what: str, met: object, seconds: float = 120.0) -> None:
        """Until `met()` is true."""
        assert callable(met)
        deadline = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.told()}"
            time.sleep(0.1)

    def clear(self) -> None:
        """End all jobs at once."""
        deadline = time.monotonic() + 40
        while _quietly(self, "squeue", "--noheader") and time.monotonic() < deadline:
            _quietly(self, "scancel", "--user=root", "--state=PENDING")
            _quietly(self, "scancel", "--full", "--signal=KILL", "--user=root")
            time.sleep(0.5)

    def told(self) -> str:
        """Jobs, and the ends of the daemons' logs."""
        logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([self.ask("squeue", "--all"), *logs])


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A SLURM whose files lie in `folder`, with the partitions `normal` and, before it, `urgent`."""
    host = socket.gethostname().split(".")[0]
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    cpus, ports = len(os.sched_getaffinity(0)), _free_ports(2)
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, cpus=cpus, ports=ports))
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    munge = ["--foreground", "--force"]
    for option, name in (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("seed-file", "seed")):
        munge.append(f"--{option}={folder / 'munge' / name}")
    here, conf = Cluster(folder), str(folder / "slurm.conf")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_start(here, "munged", *munge, f"--log-file={folder / 'munge' / 'log'}"))
        here.wait_for("munge", (folder / "munge" / "socket").exists, 20)
        daemons.append(_start(here, "slurmctld", "-D", "-c", "-f", conf))
        daemons.append(_start(here, "slurmd", "-D", "-f", conf, "-N", host))
        here.wait_for("an idle node", lambda: "idle" in _quietly(here, "sinfo", "--noheader", "--format=%T"), 60)
        yield here
    finally:
        here.clear()
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _start(here: Cluster, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    path = _tool(name)
    assert path is not None
    with (here.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([path, *arguments], env=here.env, stdout=log, stderr=log)


def _quietly(here: Cluster, *command: str) -> str:
    """Its output, and nothing while there is none to be had."""
    done = subprocess.run(command, env=here.env, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
