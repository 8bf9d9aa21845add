"""What gloo workers do in tests of bad numbers and stalls. Module-level functions: they are sent by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

from conf.paths import RunPaths, checkpoint_name
from conf.schema import TrainConfig
from tests.train import jobs

NAN, INF = float("nan"), float("inf")
FAULTS = ("nan_loss", "inf_gradient", "spike")


def faulty(config: TrainConfig, fault: str, at: int, sp: int = 1) -> dict[str, Any]:
    """Stage `short`, with a fault in the last rank's first micro-batch whenever it trains on step `at`'s data."""
    from train import loop, run
    from train.engine import init_distributed
    from train.guard import Diverged

    mesh = init_distributed(sp)
    armed = [False]
    genuine_step, genuine_build = loop.train_step, run.build

    def step(now: Any, *args: Any) -> Any:
        armed[0] = mesh.rank == mesh.world - 1 and now.state.stage_step == at
        return genuine_step(now, *args)

    def build(*args: Any) -> Any:
        engine = genuine_build(*args)
        engine.module.register_forward_hook(lambda module, inputs, out: strike(out))
        return engine

    def strike(out: Any) -> Any:
        if not armed[0] or not out.loss_sum.requires_grad:
            return out
        armed[0] = False
        if fault == "inf_gradient":
            out.loss_sum.register_hook(lambda gradient: gradient * INF)
            return out
        return out._replace(loss_sum=out.loss_sum * (NAN if fault == "nan_loss" else 100.0))

    loop.train_step, run.build = step, build
    said = io.StringIO()
    result: dict[str, Any] = {"error": ""}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result["code"] = run.run_stage(config, "short", mesh)
    except Diverged as error:
        result["error"] = str(error)
    finally:
        loop.train_step, run.build = genuine_step, genuine_build
    return result | {"said": said.getvalue()}


def stage_on(config: TrainConfig, name: str) -> int:
    """`run_stage` with the sequence parallelism of the configuration."""
    from train import run
    from train.engine import init_distributed

    with contextlib.redirect_stdout(io.StringIO()):
        return run.run_stage(config, name, init_distributed(config.mesh.sequence_parallel))


def stage_with_little_disk(config: TrainConfig, rank: int, limit: int) -> str:
    """`stage_on` for stage `short`, where `rank` can write no file above `limit` bytes; the SaveError's text."""
    import resource

    from train.checkpoint import SaveError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(os.environ["RANK"]) == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return f"code {stage_on(config, 'short')}"
    except SaveError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stage_until_the_disk_is_full(config: TrainConfig) -> str:
    """`stage_on` for stage `short`; the SaveError's text."""
    from train.files import SaveError

    try:
        return f"code {stage_on(config, 'short')}"
    except SaveError as error:
        return str(error)


def signalled(config: TrainConfig, where: str, number: int) -> int:
    """Stage `short`, on whose last rank `number` arrives in the middle of `where`."""
    from train import checkpoint, run, saver
    from train.engine import init_distributed

    mesh = init_distributed(1)
    sent = [mesh.rank != mesh.world - 1]

    def first_send(genuine: Any) -> Any:
        def sending(*args: Any) -> Any:
            if not sent[0]:
                sent[0] = True
                os.kill(os.getpid(), number)
                time.sleep(0.2)
            return genuine(*args)

        return sending

    with mock.patch.object(run, "Run", wraps=run.Run) as made, contextlib.ExitStack() as stack:
        if where == "evaluate":  # not the one before the first step
            genuine = run.Heldout.evaluate

            def evaluate(self: Any, *args: Any) -> Any:
                step = made.call_args.args[4].step
                return (first_send(genuine) if step else genuine)(self, *args)

            stack.enter_context(mock.patch.object(run.Heldout, "evaluate", evaluate))
        elif where == "start":
            stack.enter_context(mock.patch.object(run, "build", first_send(run.build)))
        else:
            module = saver if where == "save" else checkpoint
            stack.enter_context(mock.patch.object(module, "write_shard", first_send(module.write_shard)))
        return stage_on(config, "short")


def stopped_while_compiling(config: TrainConfig, cache: str) -> tuple[int, bool, str]:
    """Stage `short`; SIGTERM comes while its first step compiles: code, whether it did, newest checkpoint."""
    import threading

    from train import loop

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    began, ended = threading.Event(), threading.Event()
    compiling: list[bool] = []

    def send() -> None:
        began.wait()
        time.sleep(0.5)
        compiling.append(not ended.is_set())
        os.kill(os.getpid(), signal.SIGTERM)

    genuine = loop.train_step

    def step(*args: Any) -> Any:
        began.set()
        result = genuine(*args)
        ended.set()
        return result

    threading.Thread(target=send, daemon=True).start()
    with mock.patch.object(loop, "train_step", step):
        code = stage_on(config, "short")
    newest = sorted(path.name for path in RunPaths(Path(config.out)).checkpoints.glob("step-*"))[-1]
    return code, compiling[0], newest


def interrupted_twice(config: TrainConfig, where: str) -> None:
    """Stage `short`; SIGINT twice in a part that would take ten minutes."""
    from train import checkpoint, run

    def endless(*args: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.2)
        time.sleep(600)

    config.checkpoint.background = False  # saved is saved, however slow the machine
    if where == "evaluate":
        genuine, calls = run.Heldout.evaluate, [0]

        def evaluate(*args: Any) -> Any:
            calls[0] += 1
            return genuine(*args) if calls[0] == 1 else endless()

        run.Heldout.evaluate = evaluate  # type: ignore[method-assign]
    else:
        checkpoint.write_shard = endless
    stage_on(config, "short")


def state_of(config: TrainConfig, step: int) -> dict[str, Any]:
    path = RunPaths(Path(config.out)).checkpoints / checkpoint_name(step) / "state.json"
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def stalled(config: TrainConfig, how: str) -> None:
    """Rank 1 stops moving in step 2: `data` hangs in the loader, `frozen` as by SIGSTOP. Ends the process."""
    from train import run
    from train.engine import init_distributed

    mesh = init_distributed(1, config.launch.timeout)
    genuine = run.TrainLoader

    class Slow(genuine):  # type: ignore[misc, valid-type]
        def step(self, t: int) -> Any:
            if t == 2 and how == "data":
                time.sleep(600)
            if t == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            return super().step(t)

    if mesh.rank == 1:
        run.TrainLoader = Slow  # type: ignore[misc]
    run.run_stage(config, "short", mesh)


__all__ = ["FAULTS", "faulty", "jobs", "stage_on", "stalled", "state_of"]
