"""What the gloo workers of the sequence-parallel tests do, and the same in one process."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conf.constants import IGNORE_INDEX
from conf.schema import ModelConfig, RopeConfig, TrainConfig
from data.batch import Batch, cu_seqlens_of
from model.execution import Execution
from model.offload import HostOffload
from model.schedule import FULL, LayerPlan, plan
from model.sequence_parallel import SequenceParallel
from model.transformer import CausalLM, drawn_weights
from tests.train import jobs

VOCAB, HEADS, HEAD_DIM, SEQ_LEN, TRAILING, STEPS = 61, 4, 8, 96, 12, 3
MOBA = LayerPlan("moba", 16, 2)
PLANS = {"full": (FULL, FULL), "moba": (MOBA, LayerPlan("moba", 16, 3)), "hybrid": (MOBA, FULL)}
# Rows are cut at 24, 48 and 72 on four ranks: documents straddle every cut, and one document fills a row.
ROWS = {1: [[30, 41, 25]], 2: [[30, 41, 25], [96]]}
Result = dict[str, Any]


def model_config(num_kv_heads: int, **changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        init_std=0.3,
        **changes,
    )


def batch_of(rows: int, seed: int = 0) -> Batch:
    """Packed rows whose labels lie mostly at the end: on four ranks the first shard has a single one."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, SEQ_LEN + 1), generator=draw)
    labels = ids[:, 1:].clone()
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ROWS[rows]])
    labels[:, :24] = IGNORE_INDEX
    labels[:, 5] = ids[:, 6]
    labels[:, 40:44] = IGNORE_INDEX
    borders, longest = cu_seqlens_of(positions.numpy())
    return Batch(ids[:, :-1].contiguous(), labels, positions, torch.from_numpy(borders), longest)


def losses_and_gradients(model: CausalLM, batch: Batch, plans: str, num_valid: int) -> Result:
    """Sums, mean-loss gradients by name, and the blocks every MoBA layer chose."""
    out = model(
        batch.input_ids,
        batch.labels,
        batch.positions,
        batch.cu_seqlens,
        batch.max_seqlen,
        PLANS[plans],
        trailing=TRAILING,
    )
    model.zero_grad()
    (out.loss_sum / num_valid).backward()
    choices: dict[int, Tensor] = {}
    with torch.no_grad():
        model.hidden(
            batch.input_ids,
            batch.positions,
            batch.cu_seqlens,
            batch.max_seqlen,
            PLANS[plans],
            probe=lambda layer, q, k, ids: choices.update({layer: ids}),
        )
    return {
        "sums": torch.stack([value.detach().double() for value in out]),
        "grads": {name: p.grad.clone() for name, p in model.named_parameters()},  # type: ignore[union-attr]
        "choices": choices,
    }


def build(num_kv_heads: int, execution: Execution, **changes: Any) -> CausalLM:
    model = CausalLM(model_config(num_kv_heads, **changes), RopeConfig(), "varlen", execution)
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def exchange_cases(size: int, cases: list[tuple[int, int, str]]) -> list[Result]:
    """Every (num_kv_heads, rows, plan) on `size` ranks: sums and gradients over the group, this rank's choices."""
    from train.mesh import build_mesh

    mesh = build_mesh(size, torch.device("cpu"))
    results = []
    for num_kv_heads, rows, plans in cases:
        parallel = SequenceParallel(mesh.sp_group) if mesh.sp_group is not None else None
        model = build(num_kv_heads, Execution(parallel=parallel))
        batch = batch_of(rows)
        result = losses_and_gradients(model, mesh.cut(batch), plans, batch.num_valid)
        if parallel is not None:
            for tensor in (result["sums"], *result["grads"].values()):
                dist.all_reduce(tensor, group=parallel.group)
        result["sp_rank"] = mesh.sp_rank
        # The probe's forward pass counts too.
        result["bytes_sent"] = 0 if parallel is None else parallel.bytes_sent
        results.append(result)
    return results


def train_config(zero_stage: int, sequence_parallel: int) -> TrainConfig:
    """The model of `jobs.tiny_config` with heads to share; three steps, clipped in each."""
    config = jobs.tiny_config(zero_stage)
    config.model.num_heads, config.model.num_kv_heads, config.model.head_dim = 4, 2, 6
    config.mesh.sequence_parallel = sequence_parallel
    config.max_steps = STEPS
    return config


def train(config: TrainConfig, load: str = "", save: str = "") -> Result:
    """Fit, and report everything."""
    from train.loop import fit

    run = jobs.make_run(config, load, save)
    move_small_tensors(run.engine.module)
    fit(run)
    result = jobs.result_of(run)
    run.engine.destroy()
    return result


def move_small_tensors(model: CausalLM) -> None:
    """Offloading passes over tensors as small as those of the tests, unless told otherwise."""
    if model.model.offload is not None:
        model.model.offload = HostOffload(min_bytes=0)


def run_stage(config: TrainConfig, name: str) -> tuple[int, str]:
    """A whole stage as a worker runs it; what rank 0 printed."""
    from train import run
    from train.engine import init_distributed

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run.run_stage(config, name, init_distributed(config.mesh.sequence_parallel))
    return code, said.getvalue()


def unequal_rows(config: TrainConfig, tile: int) -> list[float]:
    """Per-token losses and a backward pass under ZeRO-3 where each rank has other tokens, and so other tiles."""
    import deepspeed

    from train.engine import build_engine, build_model, init_distributed
    from train.state import fill_model

    mesh = init_distributed(1)
    config.engine.mlp_tile = tile
    execution = Execution(mlp_tile=tile, checkpointing=config.engine.checkpointing)
    model = build_model(config, "one", RopeConfig(), 1, execution)
    fill_model(model, drawn_weights(config.model, 0), "drawn")
    engine = build_engine(model, config, 1, 1, mesh)
    length = 16 * (1 + mesh.rank)
    ids = torch.arange(length)[None] % config.model.vocab_size
    borders = torch.tensor([0, length], dtype=torch.int32)
    out = engine(ids, ids, torch.arange(length)[None], borders, length, (MOBA, FULL))
    engine.backward(out.loss_sum / 100, scale_wrt_gas=False)
    norms = []
    for parameter in model.parameters():
        grad = deepspeed.utils.safe_get_full_grad(parameter)
        assert grad is not None
        norms.append(float(grad.norm()))
    engine.destroy()
    return norms


def train_alone(config: TrainConfig) -> Result:
    """The same steps in plain PyTorch: the whole global batch at once, no DeepSpeed, no process group."""
    from train.optim import build_adamw, lr_at

    stage = config.stages["one"]
    model = CausalLM(config.model, RopeConfig(), stage.attention.backend)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    adamw = build_adamw(model, config.optim)
    plans = plan(stage.attention, config.model.num_layers, 0.0)
    result: Result = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = lr_at(stage.lr, (step + 1) * jobs.GLOBAL_BATCH * jobs.SEQ_LEN, stage.tokens)
        batch = jobs.global_batch(step)
        out = model(batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens, batch.max_seqlen, plans)
        adamw.zero_grad()
        (out.loss_sum / out.num_valid).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        assert norm > config.optim.clip  # or clipping would go untested
        adamw.step()
        result["loss"].append(float(out.loss_sum.detach() / out.num_valid))
        result["grad_norm"].append(float(norm))
    result["tensors"] = {f":{name}": p.detach().numpy() for name, p in model.named_parameters()}
    return result


def assert_trained_alike(got: Result, want: Result, where: str) -> None:
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[key], want[key], rtol=1e-5, err_msg=f"{where}: {key}")
    for name, tensor in want["tensors"].items():
        np.testing.assert_allclose(got["tensors"][name], tensor, rtol=1e-5, atol=1e-5, err_msg=f"{where}: {name}")
