"""Several machines: the SLURM script, sbatch's arguments, hostfiles, ssh's command; restarts."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import UserError
from conf.load import load_train_config
from conf.paths import RunPaths
from conf.schema import LaunchConfig, SlurmConfig, TrainConfig
from launch import hostfile, slurm
from launch.local import torchrun_command
from launch.packages import ROOT
from launch.start import starter, with_restarts


def config_of(out: Path, *more: str) -> TrainConfig:
    return compose("train", ["recipe=smoke", f"out={out}", "data.sets.text.source=x", *more])


def test_script_is_valid_and_says_what_was_asked(tmp_path: Path) -> None:
    run = tmp_path / "a run's folder"
    asked = "launch=slurm launch.nodes=16 launch.nproc=8 launch.slurm.partition=gpu launch.slurm.time=24:00:00"
    config = config_of(tmp_path, *asked.split(), "launch.slurm.extra=[--exclusive]")
    text = slurm.script(config, RunPaths(run), tmp_path / "the code", tmp_path / "config.yaml")
    for option in ("--nodes=16", "--gpus-per-node=8", "--partition=gpu", "--time=24:00:00", "--exclusive",
                   "--requeue", "--signal=USR1@120", "--open-mode=append", "--ntasks-per-node=1"):  # fmt: skip
        assert f"#SBATCH {option}\n" in text
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)


SRUN = """#!/bin/bash
echo "$@" >> {log}
code=$(head -n 1 {codes}); sed -i 1d {codes}; exit $code
"""


@pytest.mark.parametrize(
    ("codes", "left", "starts", "requeued"),
    [("0", 0, 1, False), ("75", 75, 1, True), ("2", 2, 1, False), ("65", 65, 1, False), ("1 76 0", 0, 3, False),
     ("1 1 1", 1, 3, False)],
)  # fmt: skip
def test_script_requeues_restarts_and_gives_up(
    tmp_path: Path, codes: str, left: int, starts: int, requeued: bool
) -> None:
    log, queue = tmp_path / "log", tmp_path / "codes"
    queue.write_text("\n".join(codes.split()) + "\n")
    scontrol = f'#!/bin/bash\n[ $1 = show ] && echo first || echo "$@" >> {tmp_path / "requeue"}\n'
    tools = {"srun": SRUN.format(log=log, codes=queue), "sleep": "#!/bin/bash\n", "scontrol": scontrol}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    config = config_of(tmp_path / "run", "launch=slurm", "launch.max_restarts=2")
    script = tmp_path / "job.sh"
    script.write_text(slurm.script(config, RunPaths(tmp_path / "run"), tmp_path, tmp_path / "c.yaml"))
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(script), "long"], env=env, timeout=30)
    calls = log.read_text().splitlines()
    assert (done.returncode, len(calls)) == (left, starts)
    assert calls[0].endswith(f"-m launch.node {tmp_path / 'c.yaml'} long - first:29507")
    assert (tmp_path / "requeue").exists() == requeued


def test_stages_are_chained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\necho "$@" >> {calls}\nwc -l < {calls}\n')
    (tmp_path / "sbatch").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = config_of(tmp_path / "run", "launch=slurm")
    starter(config.launch)
    assert slurm.submit(config, RunPaths(tmp_path / "run"), 0) == 0
    asked = calls.read_text().splitlines()
    assert [line.split()[-1] for line in asked] == ["short", "long", "full"]
    assert "--dependency" not in asked[0]
    assert "--dependency=afterok:1" in asked[1] and "--dependency=afterok:2" in asked[2]
    (settings,), (code,) = (list((tmp_path / "run" / "slurm").glob(f"{name}-*")) for name in ("config", "code"))
    assert load_train_config(settings).stages.keys() == config.stages.keys()
    assert (code / "train" / "run.py").read_text() == (ROOT / "train" / "run.py").read_text()
    assert "submitted stage full as job 3" in capsys.readouterr().out


def test_slurm_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="must start with --"):
        slurm.check(LaunchConfig(slurm=SlurmConfig(submit=False, extra=["x"])))
    with pytest.raises(UserError, match="contains blanks"):
        slurm.check(LaunchConfig(slurm=SlurmConfig(submit=False, partition="a\n#SBATCH --uid=0")))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch here"):
        slurm.check(LaunchConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [("a slots=8\n", "names 1 hosts"), ("a slots=1\nb\n", "has 1 slots"), ("-oProxyCommand=x\n", "line 1"),
     ("a; rm -rf /\n", "line 1"), ("a slots=eight\n", "line 1")],
)  # fmt: skip
def test_bad_hostfiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        hostfile.read_hosts(LaunchConfig(nodes=2, nproc=8, hostfile=str(path)))


def test_hosts_over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ssh runs the command here; `launch.node` there gets its arguments whole."""
    (tmp_path / "ssh").write_text('#!/bin/bash\nexec sh -c "${@: -1}"\n')
    (tmp_path / "ssh").chmod(stat.S_IRWXU)
    told = tmp_path / "told"
    (tmp_path / "python").write_text(f'#!/bin/bash\necho "$(printf "%s|" "$@")" >> {told}; cat; exit 75\n')
    (tmp_path / "python").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    path = tmp_path / "hosts"
    path.write_text("# ours\na slots=8\nb slots=8  # the second\n")
    config = config_of(tmp_path, "launch=hostfile", "launch.nodes=2", f"launch.hostfile={path}")
    hosts = hostfile.read_hosts(config.launch)
    settings = tmp_path / "it's $(here)" / "c.yaml"
    commands = [hostfile.remote_command(host, settings, "long", i, "a:29500") for i, host in enumerate(hosts)]
    started = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
    assert [process.wait(30) for process in started] == [75, 75]
    want = {f"-m|launch.node|{settings}|long|{i}|a:29500|--control|" for i in range(2)}
    assert set(told.read_text().splitlines()) == want


def test_ranks_of_several_machines_meet_at_the_first() -> None:
    command = torchrun_command(8, Path("logs"), "train.run", "c", nodes=16, node_rank=3, master="h:5")
    text = " ".join(command)
    assert "--nnodes 16 --node-rank 3 --master-addr h --master-port 5" in text and "--standalone" not in text


@pytest.mark.parametrize(
    ("codes", "limit", "left", "starts"),
    [
        ([1, 76, 0], 2, 0, 3),
        ([1, 1, 0], 1, 1, 2),
        ([2], 5, 2, 1),
        ([75], 5, 75, 1),
        ([65], 5, 65, 1),
        ([1], 0, 1, 1),
    ],
)
def test_restarts(codes: list[int], limit: int, left: int, starts: int) -> None:
    seen = iter(codes)
    count: list[str] = []

    def start(stage: str) -> int:
        count.append(stage)
        return next(seen)

    assert with_restarts(start, limit)("a") == left and len(count) == starts


def test_local_is_one_machine() -> None:
    with pytest.raises(UserError, match="local is one machine"):
        starter(LaunchConfig(nodes=2))
