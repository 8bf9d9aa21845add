"""How a run's stages are started: here, on the hosts of a file, or as SLURM jobs; and again after a crash."""

from __future__ import annotations

from collections.abc import Callable

from conf.constants import EXIT_DIVERGED, EXIT_REQUEUE, EXIT_USER_ERROR
from conf.errors import UserError, complain
from conf.paths import RunPaths
from conf.schema import LaunchConfig, TrainConfig
from launch import hostfile, local, slurm
from launch.stages import StartStage, walk

Start = Callable[[TrainConfig, RunPaths, int], int]  # (config, run folder, its lock) -> exit code
# Ends that a restart would only repeat, or that somebody wanted: bad input, guard, a signal to save, Ctrl-C, TERM.
FINAL = {0, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_REQUEUE, 130, 143}


def starter(launch: LaunchConfig) -> Start:
    """What starts the run, after a check of what `launch` asks for. Raises UserError before anything starts."""
    if launch.kind == "slurm":
        slurm.check(launch)
        return slurm.submit
    if launch.kind == "hostfile":
        hosts = hostfile.read_hosts(launch)
        return lambda config, run, lock: _walk(
            config, run, lambda stage: hostfile.start_stage(config, run, stage, hosts)
        )
    _check_local(launch)
    return lambda config, run, lock: _walk(config, run, lambda stage: local.start_stage(config, run, stage, lock))


def _walk(config: TrainConfig, run: RunPaths, start: StartStage) -> int:
    return walk(config, run, with_restarts(start, config.launch.max_restarts))


def with_restarts(start: StartStage, limit: int) -> StartStage:
    """`start`, tried again after crashes and stalls, up to `limit` times over the whole chain."""
    used = 0

    def restarting(stage: str) -> int:
        nonlocal used
        while (code := start(stage)) not in FINAL and used < limit:
            used += 1
            complain(f"stage {stage} ended with code {code}: restart {used} of {limit} (launch.max_restarts)")
        return code

    return restarting


def _check_local(launch: LaunchConfig) -> None:
    import torch

    if launch.nodes != 1:
        raise UserError(f"launch.nodes={launch.nodes} needs launch=hostfile or launch=slurm: local is one machine")
    devices = torch.cuda.device_count()
    if devices and launch.nproc > devices:
        raise UserError(f"launch.nproc={launch.nproc}: {devices} CUDA devices are visible, use at most {devices}")
