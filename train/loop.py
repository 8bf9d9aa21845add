"""The training loop. One optimizer step is `train_step`; everything around it is `fit`.

Loss = sum over tokens / valid tokens of the whole global batch (data parallel x sequence parallel x accumulation);
with weights, the weighted sum over the sum of weights. DeepSpeed averages gradients over `world` ranks, so each
micro-batch's summed loss is scaled by world / N_global; a rank's micro-batch may be some columns of its rows,
which changes nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.constants import EXIT_REQUEUE
from conf.schema import StageConfig, TrainConfig
from data.batch import Batch
from data.batch_hash import as_signed, as_text, rows_hash
from model.schedule import LayerPlan, describe, plan
from train.engine import DeepSpeedEngine, clip_and_norm, grad_norm, set_lr
from train.guard import Guard
from train.mesh import Mesh
from train.metrics import MetricsLog, Row
from train.optim import lr_at
from train.pending import PendingRow, Stopwatch
from train.saver import Saver
from train.settle import bad_row, finish_saving, settle
from train.signals import StopSignal
from train.state import TrainState

Plans = tuple[LayerPlan, ...]
TRAILING_SHARE = 16  # the trailing loss of a step is taken over the last sixteenth of full-length documents


@dataclass
class Run:
    """What `fit` works on: one stage of one run, built by `train.run`."""

    config: TrainConfig
    stage: StageConfig
    engine: DeepSpeedEngine
    mesh: Mesh
    state: TrainState
    batches: Iterator[tuple[list[Batch], dict[str, Any]]]
    metrics: MetricsLog
    stop: StopSignal
    evaluate: Callable[[Plans], Row]  # held-out loss; collective
    save: Callable[[], None]  # checkpoint of `state`; collective
    saver: Saver | None = None  # behind `save`, where it writes in the background
    guard: Guard | None = None  # without it bad steps go unseen
    left_out: Collection[int] = ()  # steps of the stage, from 0, whose data is not trained on
    at: Callable[[str, int], None] = lambda place, step: None  # hears where this rank is: a part, and a step


def fit(run: Run) -> int:
    """Train to the end of the stage, to `max_steps`, or until asked to stop. Returns the exit code.

    The row of a step is read from the device while the next step runs, so the loop never waits for its own
    kernels; whether to stop travels the same way, and so all ranks stop at the same step.
    """
    state = run.state
    tokens_per_step = run.stage.global_batch * run.stage.seq_len
    plans = current_plans(run)
    pending: PendingRow | None = None
    run.metrics.say(f"[{state.stage}] attention: {describe(plans)}")
    if state.step == 0:
        evaluate(run, plans)
    while not (state.stage_done or at_limit(run)):
        plans = announce_change(run, plans, current_plans(run))
        before, pending = pending, next_step(run, plans, tokens_per_step)
        stop = settle(run, before)
        eval_due, save_due = due(run)
        if stop or eval_due or save_due:
            stop = settle(run, pending) or stop
            pending = None
        if eval_due:
            evaluate(run, plans)
            stop = anyone_asked(run) or stop
        if save_due or stop:
            run.at("save", state.step)
            run.save()
        if stop:
            finish_saving(run)
            run.metrics.say(f"[{state.stage}] step {state.step}: stopped by a signal, saved")
            return EXIT_REQUEUE
    finish_saving(run)
    return 0


def next_step(run: Run, plans: Plans, tokens: int) -> PendingRow | None:
    """Fetch, train on and count one step of `tokens` tokens; None if its data is left out after a rollback."""
    state = run.state
    run.at("data", state.step + 1)
    timer = Stopwatch(run.mesh.device)
    lr = lr_at(run.stage.lr, state.stage_tokens + tokens, run.stage.tokens)
    micro_batches, loader_state = next(run.batches)
    run.at("step", state.step + 1)
    skipped = state.stage_step in run.left_out
    sums = None if skipped else train_step(run, micro_batches, plans, lr)
    timer.stop()
    advance(state, tokens, run.stage.tokens, loader_state)
    row = describe_step(run, lr, plans)
    if sums is None:
        run.metrics.write(bad_row(run, row, "left out", "after a rollback"))
        return None
    return PendingRow(sums, row | hash_of_step(run, micro_batches), timer, tokens)


def due(run: Run) -> tuple[bool, bool]:
    """Whether the step that was just counted calls for an evaluation, and for a checkpoint."""
    state, config = run.state, run.config
    save = state.stage_done or at_limit(run) or _every(state.step, config.checkpoint.every)
    return state.stage_done or _every(state.step, config.eval.every), save


def anyone_asked(run: Run) -> bool:
    """Whether any rank was asked to stop. Collective, and waits for the device."""
    asked = torch.tensor(float(run.stop.requested), device=run.mesh.device)
    dist.all_reduce(asked)
    return bool(asked > 0)


def train_step(run: Run, micro_batches: list[Batch], plans: Plans, lr: float) -> Tensor:
    """One optimizer step on this rank's micro-batches of the global batch.

    Returns:
        float64 on the device, as `train.pending.Outcome` reads it.
    """
    engine, mesh = run.engine, run.mesh
    weight = _to_device(sum(mesh.cut(batch).weight_sum for batch in micro_batches), mesh)
    dist.all_reduce(weight)
    divisor = torch.where(weight > 0, weight, 1.0)
    scale = mesh.world / divisor.float()
    flags = [float(run.stop.requested), *(run.saver.status() if run.saver else (0.0, 0.0))]
    sums = _to_device([0.0] * 4 + flags, mesh)
    set_lr(engine, lr)
    own_norm = None
    for index, batch in enumerate(micro_batches, start=1):
        batch = mesh.cut(batch.to(mesh.device))
        out = engine(
            input_ids=batch.input_ids,
            labels=batch.labels,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            plans=plans,
            trailing=run.stage.seq_len // TRAILING_SHARE,
            weights=batch.weights,
        )
        engine.backward(out.loss_sum * scale, scale_wrt_gas=False)
        sums[:4] += torch.stack([value.detach().double() for value in out[:4]])
        if index == len(micro_batches):
            dist.all_reduce(sums)  # before the update, which depends on them
            own_norm = clip_and_norm(engine, run.config.optim)
            if run.guard is not None:
                run.guard.arm(sums[0] / divisor, own_norm)
        engine.step()  # updates at the accumulation boundary, counts micro-batches before it
    norm = grad_norm(engine, own_norm).double().reshape(1)
    verdict = run.guard.verdict() if run.guard is not None else torch.zeros_like(norm)
    return torch.cat([sums[:5], norm, sums[5:], verdict.reshape(1), weight.reshape(1)])


def _to_device(values: float | list[float], mesh: Mesh) -> Tensor:
    """float64; from page-locked memory, since a copy from any other waits for all that the device has queued."""
    pinned = mesh.device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(mesh.device, non_blocking=True)


def describe_step(run: Run, lr: float, plans: Plans) -> Row:
    """What is known of a step without its results."""
    state = run.state
    where = {"kind": "train", "step": state.step, "tokens": state.tokens, "stage": state.stage}
    return where | {"lr": lr, "plan": describe(plans), "seq_len": run.stage.seq_len}


def hash_of_step(run: Run, micro_batches: list[Batch]) -> Row:
    """With `metrics.batch_hash`, the hash of the global batch; waits for all ranks."""
    if not run.config.metrics.batch_hash:
        return {}
    own = rows_hash(micro_batches) if run.mesh.sp_rank == 0 else 0  # the ranks of an sp group read the same rows
    total = torch.tensor(as_signed(own), dtype=torch.int64, device=run.mesh.device)
    dist.all_reduce(total)
    return {"batch_hash": as_text(int(total))}


def evaluate(run: Run, plans: Plans) -> None:
    """Held-out loss in the given plan, as a row of its own; nothing with `eval.tokens=0`."""
    if not run.config.eval.tokens:
        return
    state = run.state
    run.at("evaluate", state.step)
    values = run.evaluate(plans)
    where = {"kind": "eval", "step": state.step, "tokens": state.tokens, "stage": state.stage}
    run.metrics.write(where | values | {"plan": describe(plans), "seq_len": run.stage.seq_len})


def current_plans(run: Run) -> Plans:
    """The plan of the next step, from the share of the stage's tokens seen so far."""
    num_layers = run.config.model.num_layers
    return plan(run.stage.attention, num_layers, run.state.stage_tokens / run.stage.tokens)


def announce_change(run: Run, old: Plans, new: Plans) -> Plans:
    if new != old:
        run.metrics.say(f"[{run.state.stage}] step {run.state.step}: attention {describe(old)} -> {describe(new)}")
    return new


def advance(state: TrainState, tokens: int, stage_total: int, loader_state: dict[str, Any]) -> None:
    """Count a finished optimizer step."""
    state.step += 1
    state.stage_step += 1
    state.tokens += tokens
    state.stage_tokens += tokens
    state.stage_done = state.stage_tokens >= stage_total
    state.loader = loader_state


def at_limit(run: Run) -> bool:
    limit = run.config.max_steps
    return limit is not None and run.state.step >= limit


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
