"""What the gloo workers of these tests do. Module-level functions: they are sent by name."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.constants import IGNORE_INDEX
from conf.schema import (
    AttentionConfig,
    DataSetConfig,
    EngineConfig,
    ModelConfig,
    StageConfig,
    StageDataConfig,
    TrainConfig,
)
from data.batch import Batch, cu_seqlens_of

TOKENIZER = "tokenizer_files"  # beside the checkpoints
GLOBAL_BATCH, SEQ_LEN, STEPS = 4, 64, 5
Result = dict[str, Any]


def tiny_config(zero_stage: int = 0, precision: str = "fp32", tied: bool = False) -> TrainConfig:
    """A model whose parameter sizes do not divide by two, and a clip that bites in every step."""
    config = TrainConfig(seed=5, engine=EngineConfig(zero_stage, precision))
    config.model = ModelConfig(
        vocab_size=67,
        hidden_size=18,
        intermediate_size=25,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        tie_embeddings=tied,
    )
    attention = AttentionConfig(kind="moba", block_size=16, topk=2, full_layers=[1], backend="reference")
    tokens = GLOBAL_BATCH * SEQ_LEN * STEPS
    config.stages = {"one": StageConfig(SEQ_LEN, tokens, GLOBAL_BATCH, attention=attention)}
    config.stages["one"].lr.peak = 1e-2
    config.optim.clip = 0.25
    return config


def global_batch(step: int) -> Batch:
    """Step `step`: packed rows whose counts of valid tokens differ widely between the halves of the batch."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 67, (GLOBAL_BATCH, SEQ_LEN + 1), generator=draw)
    labels, positions = ids[:, 1:].clone(), torch.arange(SEQ_LEN).repeat(GLOBAL_BATCH, 1)
    for row, border in enumerate((5, 13, 40, 63)):
        positions[row, border:] -= border
        labels[row, border - 1] = IGNORE_INDEX
    labels[0, 4:] = IGNORE_INDEX  # 4 valid tokens in this row,
    labels[1, : 30 + step] = IGNORE_INDEX  # and rows 2 and 3, the other rank's, are nearly full
    borders, longest = cu_seqlens_of(positions.numpy())
    return Batch(ids[:, :-1].contiguous(), labels, positions, torch.from_numpy(borders), longest)


def rows_of(batch: Batch, rows: slice) -> Batch:
    positions = batch.positions[rows]
    borders, longest = cu_seqlens_of(positions.numpy())
    return Batch(batch.input_ids[rows], batch.labels[rows], positions, torch.from_numpy(borders), longest)


def stream(rank: int, world: int, start: int) -> Iterator[tuple[list[Batch], dict[str, Any]]]:
    share = GLOBAL_BATCH // world
    for step in range(start, STEPS):
        batch = global_batch(step)
        rows = range(rank * share, (rank + 1) * share)
        yield [rows_of(batch, slice(row, row + 1)) for row in rows], {"stage_step": step + 1}


def endless_stream(stage: StageConfig, vocab_size: int, mesh: Any) -> Iterator[tuple[list[Batch], dict[str, Any]]]:
    """Random rows of one document each, this rank's share in one micro-batch."""
    draw, rows, step = torch.Generator().manual_seed(mesh.rank), stage.global_batch // mesh.world, 0
    positions = torch.arange(stage.seq_len).repeat(rows, 1)
    borders, longest = cu_seqlens_of(positions.numpy())
    while True:
        ids = torch.randint(0, vocab_size, (rows, stage.seq_len + 1), generator=draw)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].clone(), positions, torch.from_numpy(borders), longest)
        step += 1
        yield [batch], {"stage_step": step}


def make_run(config: TrainConfig, load: str = "", save: str = "") -> Any:
    """A `Run` on synthetic batches, from checkpoint `load` or from scratch, saving under `save`."""
    from train.checkpoint import save_checkpoint
    from train.engine import init_distributed
    from train.loop import Run
    from train.metrics import MetricsLog
    from train.restore import read_state
    from train.run import build
    from train.signals import StopSignal
    from train.state import TrainState

    mesh = init_distributed(config.mesh.sequence_parallel)
    path = Path(load) if load else None
    state = read_state(path) if path else TrainState("one")
    engine = build(config, "one", path, True, mesh)
    rows = Rows()

    def write() -> None:
        if save:
            save_checkpoint(Path(save), engine, state, config, Path(save) / TOKENIZER, mesh)

    run = Run(
        config, config.stages["one"], engine, mesh, state, stream(mesh.dp_rank, mesh.dp_world, state.stage_step),
        MetricsLog([rows]), StopSignal(), evaluate=lambda plans: {}, save=write,
    )  # fmt: skip
    run.rows = rows.rows  # type: ignore[attr-defined]
    return run


class Rows:
    """A metrics sink that keeps the training rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            self.rows.append(row)

    def close(self) -> None: ...


def tensors_of(engine: Any) -> dict[str, Tensor]:
    """Master weights and moments, whole, as `KEY:NAME`."""
    from train.state import MOMENTS, WEIGHT, get_full, named_parameters

    return {
        f"{key}:{name}": get_full(engine, param, key).detach().cpu().clone()
        for name, param in named_parameters(engine)
        for key in (WEIGHT, *MOMENTS)
    }


def result_of(run: Any) -> Result:
    from train.state import optimizer_step

    return {
        "loss": [row["loss"] for row in run.rows],
        "grad_norm": [row["grad_norm"] for row in run.rows],
        "valid": [row["valid_tokens"] for row in run.rows],
        "tensors": {name: tensor.numpy() for name, tensor in tensors_of(run.engine).items()},
        "optimizer_step": optimizer_step(run.engine),
    }


def train(
    zero_stage: int,
    precision: str = "fp32",
    max_steps: int | None = None,
    load: str = "",
    save: str = "",
    tied: bool = False,
) -> Result:
    """Fit up to `max_steps` and report everything."""
    from train.loop import fit

    config = tiny_config(zero_stage, precision, tied)
    config.max_steps = max_steps
    run = make_run(config, load, save)
    fit(run)
    result = result_of(run)
    run.engine.destroy()
    return result


def loaded(zero_stage: int, precision: str, load: str) -> Result:
    """What an engine holds right after loading, its own (bf16) copy of the weights included."""
    from train.state import named_parameters

    run = make_run(tiny_config(zero_stage, precision), load)
    result = result_of(run)
    if zero_stage < 3:
        result["model"] = {n: p.detach().float().numpy().copy() for n, p in named_parameters(run.engine)}
    run.engine.destroy()
    return result


def newest(folder: str) -> tuple[str, str]:
    """Name of the newest valid checkpoint (or the error) and what was said on stderr."""
    from conf.errors import UserError
    from train.engine import init_distributed
    from train.restore import newest_valid

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            found = newest_valid(Path(folder), init_distributed(1))
        except UserError as error:
            return f"UserError: {error}", said.getvalue()
    return ("None" if found is None else found.name), said.getvalue()


def chain_config(out: str, prepared: str, **changes: Any) -> TrainConfig:
    """Two stages on a prepared set: full attention, then twice the length under MoBA and back to full."""
    config = TrainConfig(out=out, seed=3, engine=EngineConfig(changes.pop("zero_stage", 1), "fp32"))
    config.model = ModelConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1
    )
    config.data.sets = {"words": DataSetConfig(path=prepared)}
    data = StageDataConfig({"words": 1.0})
    moba = AttentionConfig(kind="moba", block_size=16, topk=2, full_after=0.5)
    config.stages = {
        "short": StageConfig(32, 6 * 4 * 32, 4, data=data),
        "long": StageConfig(
            64, 6 * 4 * 64, 4, attention=moba, data=data, carry_optimizer=changes.pop("carry", True)
        ),
    }
    config.eval.tokens, config.eval.every, config.checkpoint.every = 512, 4, 2
    config.max_steps = changes.pop("max_steps", None)
    assert not changes, changes
    return config


def stage(config: TrainConfig, name: str, signal_at: int = -1) -> int:
    """`run_stage`; the last rank alone gets SIGTERM while step `signal_at` is being fetched."""
    from train import run
    from train.engine import init_distributed

    mesh = init_distributed(1)
    genuine = run.TrainLoader

    class Signalling(genuine):  # type: ignore[misc, valid-type]
        def step(self, t: int) -> Any:
            if t == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(t)

    if mesh.rank == mesh.world - 1 and signal_at >= 0:
        run.TrainLoader = Signalling  # type: ignore[misc]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return run.run_stage(config, name, mesh)
    finally:
        run.TrainLoader = genuine  # type: ignore[misc]
