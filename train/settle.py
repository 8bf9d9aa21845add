"""What follows from a step's numbers, one step late and on every rank alike: its row, saving, bad steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conf.paths import RunPaths
from train.guard import Decision, Diverged, Rollback, record
from train.metrics import Row
from train.pending import PendingRow

if TYPE_CHECKING:
    from train.loop import Run


def settle(run: Run, pending: PendingRow | None) -> bool:
    """Read a finished step's numbers and act on them, on every rank alike. Returns whether to stop.

    Raises:
        Diverged, Rollback: a bad step, as `guard` says. Its update was left out.
    """
    if pending is None:
        return False
    outcome = pending.finish()
    decision = run.guard.judge(outcome.verdict, outcome.loss, outcome.grad_norm) if run.guard else None
    if decision is None:
        run.metrics.write(pending.finished_row())
    else:
        bad_step(run, pending.row, decision)
    if run.saver is not None:
        run.saver.advance(outcome.saving, outcome.save_failed)
    return outcome.stop


def bad_step(run: Run, row: Row, decision: Decision) -> None:
    """Write down a bad step and do what was decided; returns if that is to go on."""
    event = bad_row(run, row, decision.action, decision.reason)
    run.metrics.write(event)
    if decision.action == "skip":
        return
    finish_saving(run)
    step, (first, end) = row["step"], event["samples"]
    if decision.action == "stop":
        raise Diverged(f"step {step}, samples {first} to {end} of {row['stage']}: {decision.reason}")
    last = event["stage_step"]
    event["left_out"] = [max(0, last + 1 - run.config.guard.leave_out), last + 1]
    if run.mesh.is_main:
        record(RunPaths(Path(run.config.out)).guard, event)
    raise Rollback(f"step {step}: {decision.reason}")


def bad_row(run: Run, row: Row, action: str, reason: str) -> Row:
    """What is said of a step that was not trained on; `samples`: of the stage's stream, the end not included."""
    behind = run.state.step - row["step"]  # steps counted since
    stage_step, rows = run.state.stage_step - 1 - behind, run.stage.global_batch
    where = {key: row[key] for key in ("step", "tokens", "stage")} | {"stage_step": stage_step}
    samples = [stage_step * rows, (stage_step + 1) * rows]
    return {"kind": "bad", **where, "samples": samples, "action": action, "reason": reason}


def finish_saving(run: Run) -> None:
    if run.saver is not None:
        run.saver.wait()
