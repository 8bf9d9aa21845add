"""What gloo workers do in tests of saving. Module-level functions: they are sent by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.train.jobs import Result, make_run, tiny_config


def own_and_full(zero_stage: int) -> tuple[list[list[str]], list[str], bool]:
    """After two steps: names that lie whole on each rank, on none, and whether they read the same."""
    from train.loop import fit
    from train.state import MOMENTS, WEIGHT, get_full, get_own, lies_whole, named_parameters

    config = tiny_config(zero_stage)
    config.max_steps = 2
    run = make_run(config)
    fit(run)
    params = dict(named_parameters(run.engine))
    mine = [name for name, param in params.items() if lies_whole(run.engine, param)]
    equal = True
    for name, param in params.items():
        for key in (WEIGHT, *MOMENTS):
            full = get_full(run.engine, param, key)
            equal = equal and (name not in mine or torch.equal(full, get_own(run.engine, param, key)))
    whole = run.mesh.gather(mine)
    run.engine.destroy()
    return (
        whole,
        [name for name in params if not any(name in names for names in whole)],
        all(run.mesh.gather(equal)),
    )


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and the disk stays as it is at this moment."""


def interrupted_saves(folder: str) -> list[tuple[int, str, bool]]:
    """Save step 1; then die at each point of saving step 2: (point, newest valid, a folder `step-2` exists)."""
    from train import checkpoint, files, restore
    from train.loop import fit

    config = tiny_config(1)
    config.max_steps = 1
    run = make_run(config, save=folder)
    fit(run)
    run.config.max_steps = 2
    run.save, save = lambda: None, run.save
    fit(run)
    outcomes = []
    genuine = {"write": files.write_durably, "sync": files.sync_folder}
    for point in range(40):
        calls = 0

        def counted(kind: str, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > point:  # noqa: B023  (used within the iteration)
                raise Killed
            return genuine[kind](*args)

        checkpoint.write_durably = lambda *args: counted("write", *args)
        checkpoint.sync_folder = lambda *args: counted("sync", *args)
        died = False
        try:
            save()
        except Killed:
            died = True
        finally:
            checkpoint.write_durably, checkpoint.sync_folder = genuine["write"], genuine["sync"]
        newest = restore.newest_valid(Path(folder), run.mesh)
        assert newest is not None
        outcomes.append((point, newest.name, died))
        if not died:
            break
    run.engine.destroy()
    return outcomes


def full_disk(folder: str) -> Result:
    """Rank 1 cannot write while step 1 is saved; then the disk has room again."""
    from train import checkpoint, files, restore
    from train.loop import fit

    config = tiny_config(2)
    config.max_steps = 1
    run = make_run(config, save=folder)
    genuine = files.write_durably

    def refuse(*args: Any) -> Any:
        raise OSError(28, "No space left on device", str(args[1]))

    if run.mesh.rank == 1:
        checkpoint.write_durably = refuse
    message = ""
    try:
        fit(run)
    except checkpoint.SaveError as error:
        message = str(error)
    checkpoint.write_durably = genuine
    after_failure = sorted(path.name for path in Path(folder).glob("step-*"))
    run.save()
    result = {"message": message, "after_failure": after_failure}
    result["newest"] = restore.newest_valid(Path(folder), run.mesh).name
    result["left"] = sorted(path.name for path in Path(folder).iterdir())
    run.engine.destroy()
    return result
