"""Worker entry: `python -m train.run CONFIG STAGE`, one process per device, started by `launch` through torchrun.

Builds one stage (from the newest checkpoint of the run, or from scratch for the first stage), trains it to its
end or to `max_steps`, saves and leaves. Exit codes: 0 done, 2 bad input, 65 stopped by `guard`, 75 stopped
by a signal and saved, 76 a rank did not move for `launch.timeout`; 1 anything else.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from conf.constants import EXIT_DIVERGED, EXIT_USER_ERROR
from conf.domains import set_of
from conf.errors import UserError, complain
from conf.inherit import stage_ropes
from conf.load import load_train_config
from conf.paths import RunPaths
from conf.process import follow_parent, leave
from conf.schema import TrainConfig
from data.loader import TrainLoader
from data.manifest import load_manifest
from data.store import TokenStore
from train.checkpoint import SaveError
from train.determinism import set_deterministic
from train.engine import DeepSpeedEngine, build_engine, build_model, init_distributed, micro_batches_per_step
from train.execution import exchange_text, execution_of
from train.guard import Diverged, Guard, Rollback
from train.guard import left_out as read_left_out
from train.heldout import Heldout
from train.loop import Run, fit
from train.mesh import Mesh
from train.metrics import MetricsLog, open_metrics
from train.origin import open_origin
from train.restore import load_engine, newest_valid, read_state
from train.saver import Saver
from train.signals import StopSignal
from train.state import TrainState, fill_model, put_weights, reset_optimizer
from train.watchdog import Watchdog


def run_stage(config: TrainConfig, name: str, mesh: Mesh, stop: StopSignal | None = None) -> int:
    """Train stage `name` of `config` from wherever the run stands, and back from a checkpoint at a rollback.

    Returns the exit code. `stop`: already installed, else one is.
    """
    stop = stop or StopSignal().install()
    set_deterministic(config.engine.deterministic)
    watchdog = Watchdog(RunPaths(Path(config.out)).heartbeat, mesh.rank, config.launch.timeout).start()
    try:
        while True:
            try:
                return _attempt(config, name, mesh, stop, watchdog)
            except Rollback as rollback:
                if mesh.is_main:
                    print(f"WARNING: {rollback}; back to the newest checkpoint", file=sys.stderr, flush=True)
            gc.collect()  # the engine that was
            watchdog.at("start", 0)
    finally:
        watchdog.end()


def _attempt(config: TrainConfig, name: str, mesh: Mesh, stop: StopSignal, watchdog: Watchdog) -> int:
    """From the newest checkpoint to the end of the stage, a signal or a rollback."""
    paths, stage = RunPaths(Path(config.out)), config.stages[name]
    checkpoint = newest_valid(paths.checkpoints, mesh)
    state = starting_state(None if checkpoint is None else read_state(checkpoint), list(config.stages), name)
    if state.stage_done:
        return 0
    stores = open_stores(config, name, "train")
    loader = TrainLoader(
        stage,
        stores,
        name=name,
        seed=config.seed,
        dp_rank=mesh.dp_rank,
        dp_world=mesh.dp_world,
        start_step=state.stage_step,
        pin_memory=mesh.device.type == "cuda",
    )
    if state.loader:
        loader.check_state(state.loader)
    keep_optimizer = state.stage_step > 0 or stage.carry_optimizer
    engine = build(config, name, checkpoint, keep_optimizer, mesh)
    held = open_stores(config, name, "heldout") if config.eval.tokens else {}
    heldout = Heldout(list(held.values()), stage, config.eval, mesh)
    metrics = open_log(config, state, resumed=checkpoint is not None, mesh=mesh)
    if mesh.sp_world > 1:
        metrics.say(f"[{name}] {exchange_text(config, name)}")
    tokenizer = next(iter(stores.values())).tokenizer_path

    saver = Saver(paths.checkpoints, engine, config, tokenizer, mesh)
    left_out, rollbacks = mesh.broadcast(read_left_out(paths.guard, name) if mesh.is_main else None)
    if rollbacks > config.guard.limit:
        raise Diverged(f"stage {name}: {rollbacks} rollbacks, guard.limit={config.guard.limit}")
    run = Run(
        config, stage, engine, mesh, state, iter(loader), metrics, stop,
        evaluate=lambda plans: heldout.evaluate(engine, plans), save=lambda: saver.save(state), saver=saver,
        guard=Guard(config.guard, engine, state.recent), left_out=left_out, at=watchdog.at,
    )  # fmt: skip
    try:
        return fit(run)
    except Rollback:
        engine.destroy()
        raise
    finally:
        metrics.close()


def starting_state(saved: TrainState | None, chain: list[str], name: str) -> TrainState:
    """Where stage `name` starts, given the state of the newest checkpoint.

    Resumes inside the stage; follows its finished predecessor; starts from scratch only as the first of the
    chain. A returned state with `stage_done` means that there is nothing left to do.

    Raises:
        UserError: the predecessor is not finished, or the checkpoint is of a stage the chain does not have.
    """
    index = chain.index(name)
    if saved is None:
        if index:
            raise UserError(f"stage {name} starts from stage {chain[index - 1]}, which has no checkpoint yet")
        return TrainState(stage=name)
    if saved.stage not in chain:
        raise UserError(f"the newest checkpoint is of stage {saved.stage}; stages has only {', '.join(chain)}")
    at = chain.index(saved.stage)
    if at == index:
        return saved
    if at > index:
        return replace(saved, stage_done=True)
    if at == index - 1 and saved.stage_done:
        return TrainState(stage=name, step=saved.step, tokens=saved.tokens)
    raise UserError(
        f"stage {name} starts from stage {chain[index - 1]}; the run is in {saved.stage}: finish it first"
    )


def build(
    config: TrainConfig, name: str, checkpoint: Path | None, keep_optimizer: bool, mesh: Mesh
) -> DeepSpeedEngine:
    """Model and engine of a stage, with the weights of the checkpoint, of the `init` folder, or freshly drawn."""
    stage = config.stages[name]
    accumulation = micro_batches_per_step(stage.global_batch, stage.micro_batch, mesh.dp_world)
    rope, execution = stage_ropes(config.stages)[name], execution_of(config, mesh)
    model = build_model(config, name, rope, accumulation, execution)
    origin = open_origin(config, checkpoint, mesh)
    fill_model(model, origin.weights, origin.name)
    engine = build_engine(model, config, stage.micro_batch, accumulation, mesh)
    if checkpoint is None:
        put_weights(engine, origin.weights)  # again: in bf16 the engine made its masters of rounded ones
        reset_optimizer(engine, 0)
    else:
        load_engine(engine, checkpoint, with_optimizer=keep_optimizer)
    return engine


def open_stores(config: TrainConfig, name: str, split: str) -> dict[str, TokenStore]:
    """The stage's domains by name; for `heldout` their sets, as far as they hold out anything.

    Raises UserError where the model's vocabulary is too small for a set, or nothing at all is held out.
    """
    data = config.stages[name].data
    sets = {one: set_of(data, one) for one in data.domains}
    if split == "heldout":
        manifests = {one: load_manifest(Path(config.data.sets[one].path)) for one in sets.values()}
        held = [one for one, manifest in manifests.items() if manifest.splits[split].documents]
        sets = {one: one for one in held or manifests}
    stores = {one: TokenStore(Path(config.data.sets[key].path), split) for one, key in sets.items()}
    for one, store in stores.items():
        if store.vocab_size > config.model.vocab_size:
            raise UserError(
                f"data.sets.{one} has {store.vocab_size} token ids, model.vocab_size={config.model.vocab_size}: "
                f"use model.vocab_size={store.vocab_size} or more"
            )
    return stores


def open_log(config: TrainConfig, state: TrainState, *, resumed: bool, mesh: Mesh) -> MetricsLog:
    """Rank 0's log, an empty one elsewhere. Rows of steps that will run again are dropped."""
    if not mesh.is_main:
        return MetricsLog()
    total = sum(stage.tokens for stage in config.stages.values())
    if config.max_steps is not None:
        total = min(total, tokens_of_steps(config, config.max_steps))
    return open_metrics(config, state.stage, state.step if resumed else -1, state.tokens, total)


def tokens_of_steps(config: TrainConfig, steps: int) -> int:
    """Tokens of the first `steps` optimizer steps of the chain."""
    total = 0
    for stage in config.stages.values():
        per_step = stage.global_batch * stage.seq_len
        here = min(steps, stage.tokens // per_step)
        total, steps = total + here * per_step, steps - here
    return total


def main(arguments: list[str] | None = None) -> int:
    """Run as a worker; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print("usage: python -m train.run CONFIG_YAML STAGE", file=sys.stderr)
        return EXIT_USER_ERROR
    follow_parent()
    stop = StopSignal().install()  # first of all: whatever follows may take long
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about what DeepSpeed calls
    code = 1
    try:
        config = load_train_config(Path(arguments[0]))
        if arguments[1] not in config.stages:
            raise UserError(f"stages has no {arguments[1]}; there are: {', '.join(config.stages)}")
        mesh = init_distributed(config.mesh.sequence_parallel, config.launch.timeout)
        code = run_stage(config, arguments[1], mesh, stop)
    except UserError as error:
        complain_once(error)
        code = EXIT_USER_ERROR
    except SaveError as error:
        complain_once(error)
    except Diverged as error:
        complain_once(error)
        code = EXIT_DIVERGED
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def complain_once(error: Exception) -> None:
    """One line from rank 0. Another rank speaks up only if rank 0 has not ended the job a moment later."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(1.0)  # torchrun ends this process when rank 0 has failed too
    complain(error)


if __name__ == "__main__":
    leave(main())
