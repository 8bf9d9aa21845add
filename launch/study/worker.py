"""Runs arms of a study in this process: `python -m launch.study.worker REQUEST`, started by `launch.study.run`.

Each arm is an ordinary run: composed, checked, prepared and trained by `launch.train` and `train.run`, but not in
a new process per stage. Several workers share the arms by locks; an arm whose result exists is not repeated.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from conf.constants import EXIT_REQUEUE, EXIT_USER_ERROR
from conf.errors import UserError, complain
from conf.paths import RunPaths
from conf.process import leave
from conf.schema import StudyConfig, TrainConfig
from launch import train
from launch.stages import walk
from launch.start import Start
from launch.study.places import Places
from launch.study.plan import Arm, LossAt, Plan, arms_of, filled, load_plan, scale_of, with_start

Json = dict[str, Any]
POLL_SECONDS = 0.5


class Stopped(Exception):
    """A signal asked for the end: no further arm is begun."""


def work(config: StudyConfig, deadline: float = float("inf")) -> int:
    """Run every arm that no other worker has, until all are done or `deadline` (time.time()) has passed.

    Returns 0; 1 if an arm failed (others that do not start from it are run all the same); 75 after a signal.
    """
    plan, places = load_plan(config.name), Places.of(config)
    arms, code = arms_of(plan, config), 0
    start = _joined_start() if config.joined else None
    failed: set[str] = set()
    while True:
        failed |= {arm.name for arm in arms if arm.starts in failed}  # arms stand behind what they start from
        left = [arm for arm in arms if not places.result(arm).is_file() and arm.name not in failed]
        ready = [arm for arm in left if not arm.starts or places.result_of(arm.starts).is_file()]
        if not left or time.time() > deadline:
            return code
        for arm in ready:
            if time.time() > deadline:
                return code
            with _claim(places.runs / f"{arm.name}.lock") as mine:
                if not mine or places.result(arm).is_file():
                    continue
                try:
                    run_arm(arm, plan, config, places, start)
                except Stopped:
                    return EXIT_REQUEUE
                except Exception as error:  # one arm's failure must not take the others with it
                    traceback.print_exc()
                    complain(f"arm {arm.name}: {error}")
                    failed.add(arm.name)
                    code = 1
            break  # look again from the front: what this arm made possible comes first
        else:
            time.sleep(POLL_SECONDS)


def run_arm(arm: Arm, plan: Plan, config: StudyConfig, places: Places, start: Start | None = None) -> None:
    """Train, measure, and write the result.

    Raises:
        Stopped: a signal ended the training, saved.
        UserError: bad input, or the training failed.
    """
    from eval.bench.environment import environment
    from eval.files import read_lines, write_atomic
    from launch.study.measure import measure

    values, group = scale_of(plan, config), plan.groups[arm.group]
    out = places.runs / arm.name
    overrides = [f"out={out}", *with_start(arm, places.runs), *places.set_overrides(group), *config.set]
    print(f"[{arm.name}] {time.strftime('%H:%M:%S')}", flush=True)
    began = time.perf_counter()
    resolved = train.resolve(overrides)
    code = train.run(resolved, start)
    if code == EXIT_REQUEUE:
        raise Stopped
    if code:
        raise UserError(f"its training ended with code {code}; its folder is {out}")
    trained = time.perf_counter()
    losses = [_filled_loss(at, values) for at in group.losses]
    tasks = [filled(line.split(), values) for line in group.tasks]
    rows = [row for row in read_lines(RunPaths(out).metrics) if row["kind"] == "train"]
    about = {
        "arm": arm.name, "group": arm.group, "seed": arm.seed, "choices": arm.choices, "scale": config.scale,
        "overrides": [*arm.overrides, *config.set], "starts": arm.starts, "workers": config.workers,
        "environment": environment(_device_name()), "model": asdict(resolved.model),
    }  # fmt: skip

    def keep(path: Path, measured: Json) -> None:
        seconds = {"train": trained - began, "measure": time.perf_counter() - trained}
        result = {**about, **measured, "train": _training(rows), "seconds": seconds}
        write_atomic(path, (json.dumps(result, allow_nan=False) + "\n").encode())

    unfinished = places.unfinished(arm)  # of a run cut off while it measures: all until then
    keep(unfinished, {})
    measured = measure(out, losses, tasks, places.sets(), partial(keep, unfinished)) if losses or tasks else {}
    keep(places.result(arm), measured)
    unfinished.unlink()


def _filled_loss(at: LossAt, values: Json) -> LossAt:
    seq_len, trailing, documents = filled([at.seq_len, at.trailing, at.documents], values)
    return replace(at, seq_len=seq_len, trailing=trailing, documents=documents)


def _training(rows: list[Json]) -> Json:
    """The steps as columns, and the device's seconds in them by stage: all, and as if the first, which may compile
    kernels, had taken the mean of the others."""
    taken: dict[str, list[float]] = {}
    before, steps = 0, []
    for row in rows:
        tokens, before = row["tokens"] - before, row["tokens"]
        taken.setdefault(row["stage"], []).append(tokens / row["tokens_per_s"])
        steps.append([row["tokens"], round(row["loss"], 5), _rounded(row.get("trailing_loss"))])
    stages = {row["stage"]: {"seq_len": row["seq_len"], "tokens": row["tokens"]} for row in rows}
    plans = list(dict.fromkeys((row["stage"], row["plan"]) for row in rows))
    return {"columns": ["tokens", "loss", "trailing_loss"], "steps": steps, "stages": stages,
            "plans": plans, "step_seconds": {stage: sum(each) for stage, each in taken.items()},
            "steady_seconds": {stage: _steady(each) for stage, each in taken.items()}}  # fmt: skip


def _steady(seconds: list[float]) -> float:
    return sum(seconds[1:]) * len(seconds) / (len(seconds) - 1) if len(seconds) > 1 else sum(seconds)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _joined_start() -> Start:
    """What runs the stages of an arm in this process, in a process group of one that all arms share."""
    import torch

    from train.engine import init_distributed
    from train.run import run_stage
    from train.signals import StopSignal

    mesh, stop = init_distributed(1), StopSignal().install()

    def start(config: TrainConfig, run: RunPaths, lock: int) -> int:
        def stage(name: str) -> int:
            code = run_stage(config, name, mesh, stop)
            gc.collect()  # the engine that was
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return code

        return walk(config, run, stage)

    return start


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether this process holds `path`'s lock now; given back at the end, and by the kernel at any death."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def main(arguments: list[str] | None = None) -> int:
    """Run as a worker; returns the exit code."""
    request = json.loads(Path((sys.argv[1:] if arguments is None else arguments)[0]).read_text(encoding="utf-8"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = work(StudyConfig(**request["config"]), request["deadline"] or float("inf"))
    except UserError as error:
        complain(error)
        code = EXIT_USER_ERROR
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    leave(main())
