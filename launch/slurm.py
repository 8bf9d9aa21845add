"""`launch=slurm`: one job per stage, chained by dependency, from a script that lies in the run folder to be read.

The job asks to be requeued, gets SIGUSR1 `launch.slurm.grace` seconds before its time ends, and requeues itself
when the workers say they have saved and want to go on (code 75). It runs the code and reads the configuration as
they were at submission: copies of both lie beside the script, and what is edited afterwards changes no job.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from conf.constants import EXIT_DIVERGED, EXIT_REQUEUE, EXIT_USER_ERROR
from conf.errors import UserError
from conf.paths import RunPaths
from conf.schema import LaunchConfig, TrainConfig
from launch.snapshot import save_code, save_job_config
from launch.stages import next_stage, read_progress

BODY = """
# $1: the stage. Exit code 75 of the workers: told to stop, saved, to be continued by the same job.
set -u
cd {code}  # the copy of the code: `python -m` looks here first
export PYTHONUNBUFFERED=1
# Signals are for the workers, which srun passes them on to; this script waits for what they make of them.
trap : TERM USR1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(({port} + SLURM_JOB_ID % 1000))
starts=0
while :; do
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 {python} -m launch.node {config} "$1" - "$head:$port"
    code=$?
    case $code in
        0) exit 0 ;;
        {requeue}) scontrol requeue "$SLURM_JOB_ID"; sleep 60; exit {requeue} ;;
        {user_error} | {diverged}) exit $code ;;
    esac
    starts=$((starts + 1))
    if [ $starts -gt {max_restarts} ]; then exit $code; fi
    echo "stage $1 ended with code $code: restart $starts of {max_restarts} (launch.max_restarts)"
done
"""


def check(launch: LaunchConfig) -> None:
    """UserError where jobs cannot be submitted, or an option would not be one line of the script."""
    if launch.slurm.submit and shutil.which("sbatch") is None:
        raise UserError("launch=slurm: there is no sbatch here; launch.slurm.submit=false only writes the script")
    fields = (launch.slurm.partition, launch.slurm.account, launch.slurm.qos, launch.slurm.time)
    for text in (*fields, *launch.slurm.extra):
        if any(char.isspace() or not char.isprintable() for char in text):
            raise UserError(f"launch.slurm: {text!r} contains blanks: give options as --name=value")
    for text in launch.slurm.extra:
        if not text.startswith("--"):
            raise UserError(f"launch.slurm.extra: {text!r} is no option: it must start with --")


def script(config: TrainConfig, run: RunPaths, code: Path, settings: Path) -> str:
    """The batch script of a run on the copies of the code and of its configuration."""
    launch, folder = config.launch, run.root.resolve()
    options = [
        f"--job-name={folder.name.replace(' ', '_')}",
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={launch.nproc}"] if launch.slurm.gpus else []),
        *([f"--cpus-per-task={launch.slurm.cpus}"] if launch.slurm.cpus else []),
        *(
            f"--{name}={value}"
            for name in ("partition", "account", "qos", "time")
            if (value := getattr(launch.slurm, name))
        ),
        "--requeue",
        "--open-mode=append",
        *([f"--signal=USR1@{launch.slurm.grace}"] if launch.slurm.grace else []),
        *launch.slurm.extra,
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    body = BODY.format(
        code=shlex.quote(str(code)), python=shlex.quote(sys.executable), config=shlex.quote(str(settings)),
        port=launch.port, requeue=EXIT_REQUEUE, user_error=EXIT_USER_ERROR, diverged=EXIT_DIVERGED,
        max_restarts=launch.max_restarts,
    )  # fmt: skip
    return "\n".join(lines) + "\n" + body


def submit(config: TrainConfig, run: RunPaths, _lock: int) -> int:
    """Write `slurm/` and submit the stages that are left, each to start when the one before ended well."""
    folder = run.root / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.sh"
    job.write_text(script(config, run, save_code(folder), save_job_config(config, folder)), encoding="utf-8")
    if not config.launch.slurm.submit:
        print(f"wrote {job}: sbatch --output={folder}/%j.out {job} STAGE")
        return 0
    first = next_stage(config, read_progress(run))
    if first is None:
        print(f"{config.out}: nothing is left to do")
        return 0
    chain = list(config.stages)
    previous = ""
    for stage in chain[chain.index(first) :]:
        previous = _sbatch(job, folder, stage, previous)
        print(f"submitted stage {stage} as job {previous}: {folder / f'{previous}.out'}")
    return 0


def _sbatch(job: Path, folder: Path, stage: str, previous: str) -> str:
    """Submit one stage after job `previous`; returns the job's id."""
    after = [f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes"] if previous else []
    output = str(folder.resolve() / "%j.out").replace("\\", "\\\\")
    command = ["sbatch", "--parsable", f"--output={output}", *after, str(job.resolve()), stage]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refused {job}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
