"""Where a stage hands over to the next: the newest checkpoint says what is done, the chain says what follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from conf.errors import UserError
from conf.paths import CheckpointPaths, RunPaths
from conf.schema import TrainConfig

StartStage = Callable[[str], int]  # stage name -> exit code of its workers


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps over the whole chain, and the stage its newest checkpoint is in."""

    step: int = 0
    stage: str = ""  # empty: nothing saved yet
    stage_done: bool = False


def read_progress(run: RunPaths) -> Progress:
    """Progress from the newest valid checkpoint. Raises UserError if there are checkpoints and none is valid."""
    from model.weights import find_checkpoint, list_checkpoints

    if not run.checkpoints.is_dir() or not list_checkpoints(run.checkpoints):
        return Progress()
    state = json.loads(CheckpointPaths(find_checkpoint(run.root)).state.read_text(encoding="utf-8"))
    return Progress(int(state["step"]), str(state["stage"]), bool(state["stage_done"]))


def next_stage(config: TrainConfig, progress: Progress) -> str | None:
    """The stage to run now; None when the chain, or `max_steps` of it, is done."""
    chain = list(config.stages)
    if config.max_steps is not None and progress.step >= config.max_steps:
        return None
    if not progress.stage:
        return chain[0]
    if progress.stage not in chain:
        raise UserError(
            f"the newest checkpoint is of stage {progress.stage}, and stages has only {', '.join(chain)}"
        )
    index = chain.index(progress.stage) + progress.stage_done
    return chain[index] if index < len(chain) else None


def walk(config: TrainConfig, run: RunPaths, start: StartStage) -> int:
    """Run stage after stage until the chain or `max_steps` is done. Returns 0, or the code of what failed."""
    progress = read_progress(run)
    while (stage := next_stage(config, progress)) is not None:
        code = start(stage)
        if code:
            return code
        before, progress = progress, read_progress(run)
        if progress == before:
            raise RuntimeError(
                f"the workers of stage {stage} ended well and saved nothing new in {run.checkpoints}"
            )
    return 0
