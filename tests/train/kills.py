"""A run killed with SIGKILL over and over: `python -m tests.train.kills CONFIG STAGE KILLS SEED`, JSON on stdout.

One process imports everything, then forks each worker, which makes a start cheap: a quarter of a second, in which
the worker joins a group, checks and loads the newest checkpoint and builds its engine, as any start does. It
trains and saves as `train.run` does; only the interpreter's own start is not killed here. Workers are killed at
random moments of their first steps; when KILLS of them have died, the run is left to itself until its end.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from conf.load import load_train_config
from conf.paths import RunPaths
from conf.schema import TrainConfig

MOST_STEPS, LONGEST_SECONDS = 4, 0.1  # a worker is killed after so many steps, and so long after that one


def work(config: TrainConfig, stage: str, started: int) -> int:
    """The worker: a whole `run_stage` on one rank. `started`: pipe that hears of every step."""
    import torch.distributed as dist

    from train import loop, run
    from train.engine import init_distributed

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    genuine = loop.train_step

    def told_step(*args: object) -> object:
        result = genuine(*args)  # type: ignore[arg-type]
        os.write(started, b".")
        return result

    loop.train_step = told_step  # type: ignore[assignment]
    return run.run_stage(config, stage, init_distributed(1))


def start(config: TrainConfig, stage: str) -> tuple[int, int]:
    """(process id of a forked worker, pipe that hears of its steps)."""
    hear, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        return pid, hear
    code = 1
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        code = work(config, stage, tell)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def newest(run: RunPaths) -> int:
    """Step of the newest checkpoint by name."""
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)


def main(config_path: str, stage: str, kills: str, seed: str) -> None:
    # Before the forks, once for all; the last two are what DeepSpeed and AdamW import when they are built.
    for name in ("deepspeed", "train.run", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    config, draw = load_train_config(Path(config_path)), random.Random(int(seed))
    run = RunPaths(Path(config.out))
    steps, left_over, died = [], 0, 0
    while died < int(kills):
        pid, pipe = start(config, stage)
        if all(os.read(pipe, 1) for _ in range(draw.randint(1, MOST_STEPS))):
            time.sleep(draw.uniform(0, LONGEST_SECONDS))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(pipe)
        if not os.WIFSIGNALED(status):
            print(json.dumps({"error": f"a worker left by itself with status {status} after {died} kills"}))
            return
        died += 1
        steps.append(newest(run))
        left_over += any(run.checkpoints.glob(".tmp-*"))
    pid, _ = start(config, stage)
    _, status = os.waitpid(pid, 0)
    print(json.dumps({"kills": died, "newest": steps, "torn": left_over, "status": status}))


if __name__ == "__main__":
    main(*sys.argv[1:])
