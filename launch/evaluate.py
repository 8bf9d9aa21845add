"""`moba eval`: evaluate a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from conf.compose import compose
from conf.errors import UserError
from conf.ranges import check_fields
from conf.schema import EvalConfig, LaunchConfig
from launch.command import Command


def resolve(overrides: Sequence[str]) -> EvalConfig:
    return compose("eval", overrides)


def run(config: EvalConfig) -> int:
    """Evaluate here, or on `sequence_parallel` processes of this machine. Returns the exit code."""
    check_fields(config)
    if config.sequence_parallel > 1 and config.suite != "report":
        return _run_workers(config)
    from eval.run import run as run_evaluation

    run_evaluation(config)
    return 0


def _run_workers(config: EvalConfig) -> int:
    """Rank 0 writes to the terminal, the others into `logs` of `out`."""
    import torch

    from conf.load import save_config
    from conf.paths import RunPaths
    from eval.run import prepare
    from launch.local import start_workers, torchrun_command

    prepare(config)
    wanted, devices = config.sequence_parallel, torch.cuda.device_count()
    if config.device != "cpu" and 0 < devices < wanted:
        raise UserError(f"sequence_parallel={wanted}: this machine has {devices} GPUs; use fewer, or device=cpu")
    with tempfile.TemporaryDirectory(prefix="moba-eval-") as folder:
        settings = Path(folder) / "config.yaml"
        save_config(config, settings)
        command = torchrun_command(wanted, RunPaths(Path(config.out)).logs, "eval.worker", str(settings))
        return start_workers(command, LaunchConfig(nproc=wanted))


COMMAND = Command(
    name="eval",
    summary="evaluate a checkpoint: losses, RULER tasks, the gate's choices; writes a report",
    text="""
Prints tables and writes eval/*.json, plots/*.png and report.html under `out`.
suite=loss: held-out, position-wise and trailing loss. suite=ruler: long-context tasks.
suite=gate: which blocks queries choose. suite=needle: one needle by depth and length. suite=lm_eval: tasks of the
lm-eval harness. Several checkpoints, checkpoint=[A,B], get a page that compares them.
sequence_parallel=4: four processes share each prompt and each row of the loss.
""",
    examples=(
        "moba eval checkpoint=runs/x out=runs/x",
        "moba eval checkpoint=runs/x out=runs/x suite=ruler ruler.lengths=[2048] ruler.samples=50",
        "moba eval checkpoint=runs/x out=runs/x suite=ruler ruler.lengths=[1048576] sequence_parallel=4",
        "moba eval checkpoint=runs/x/hf out=runs/y dataset=runs/data/stdlib attention=moba_fine attention.topk=8",
    ),
    resolve=resolve,
    run=run,
)
