"""`moba train`: resolve, validate, write the run's configuration, prepare its data, walk the chain of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conf.compose import compose_train, is_group, override_keys, recompose
from conf.domains import set_of
from conf.errors import UserError
from conf.load import load_train_config, save_config
from conf.paths import RunPaths
from conf.schema import ResumeConfig, TrainConfig
from conf.validate import validate
from launch.command import Command
from launch.init import Completion, check_origin, check_sets, complete_ropes
from launch.preview import num_steps, plans_text, print_plan
from launch.rundir import check_same, check_timely, record_changes, run_lock
from launch.stages import read_progress
from launch.start import Start, starter


def resolve(overrides: Sequence[str]) -> TrainConfig:
    """The configuration asked for. An existing run goes on with its own, unless groups are chosen anew."""
    asked = override_keys(overrides)
    saved = RunPaths(Path(str(asked.get("out") or "."))).config
    if "out" in asked and saved.is_file() and not any(map(is_group, asked)):
        return complete_ropes(recompose(load_train_config(saved), overrides), None)
    completion = Completion(asked)
    config = compose_train(overrides, completion)
    return complete_ropes(config, completion.origin)


def run(config: TrainConfig, begin: Start | None = None) -> int:
    """Train, or go on training, the run in `config.out`. Returns the exit code.

    `begin`: what starts the workers, where not `config.launch` says it.
    """
    if not config.out:
        raise UserError("out is empty: give the folder of the run, as out=runs/x")
    validate(config, config.launch.world)
    begin = begin or starter(config.launch)
    paths = RunPaths(Path(config.out))
    check_same(config, paths)
    if config.dry_run:
        print_plan(config, read_progress(paths))
        return 0
    with run_lock(paths) as lock:
        changes = check_same(config, paths)  # again: another start may have held the lock until now
        progress = read_progress(paths)
        check_timely(changes, config, progress)
        prepare_data(config, fresh=not progress.stage)
        if changes:
            record_changes(changes, paths, progress)
        if (start := config.init.hf or config.init.checkpoint) and not progress.stage:
            print(f"{config.out}: starts from {start}")
        save_config(replace(config, resume=ResumeConfig()), paths.config, comment=plans_text(config))
        code = begin(config, paths, lock)
    if code == 0 and config.launch.kind != "slurm":
        total = sum(num_steps(stage) for stage in config.stages.values())
        limit = "" if config.max_steps is None else f" (max_steps={config.max_steps})"
        print(f"{config.out}: {read_progress(paths).step} of {total} steps done{limit}")
    return code


def prepare_data(config: TrainConfig, fresh: bool) -> None:
    """Prepare the data sets that can be prepared on demand, and check all against model and each other.

    `fresh`: nothing has been trained yet, so the folder that `init` names is looked at as well.
    """
    from data.prepare import prepare_sets
    from data.source import StageSource
    from data.store import TokenStore

    if fresh:
        check_origin(config)
    prepare_sets(config.data)
    if fresh:
        check_sets(config)
    stores: dict[str, TokenStore] = {}
    for name, one in config.data.sets.items():
        key = f"data.sets.{name}"
        store = stores[name] = TokenStore(Path(one.path), "train")
        if store.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size={config.model.vocab_size} is below the {store.vocab_size} tokens of {key}'s "
                f"tokenizer: use model.vocab_size={store.vocab_size} or another set"
            )
    for name, stage in config.stages.items():
        sets = {domain: stores[set_of(stage.data, domain)] for domain in stage.data.domains}
        try:
            StageSource(stage, sets, config.seed, name)  # packs too, once, before a worker waits for it
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from error


COMMAND = Command(
    name="train",
    summary="train a model through a chain of stages; run it again to resume",
    text="""
Composes a recipe, checks it, prepares its data if need be and trains stage after stage into the run folder
`out`: config.yaml, metrics.jsonl, checkpoints/. The same command again goes on from the newest checkpoint;
`moba train out=RUN` alone does so with the run's own configuration.
""",
    examples=(
        "moba train recipe=quickstart out=runs/x",
        "moba train recipe=quickstart out=runs/x dry_run=true stages.long.attention.topk=8",
        "moba train out=runs/x launch.nproc=1   # go on with an existing run",
    ),
    resolve=resolve,
    run=run,
)
