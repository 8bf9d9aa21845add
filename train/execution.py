"""From the configuration and this rank's place to how its model computes."""

from __future__ import annotations

from conf.schema import TrainConfig
from model.execution import Execution
from model.fused import pieces
from model.fused_loss import takes_fused
from model.sequence_parallel import SequenceParallel, bytes_per_layer
from model.shapes import head_dim
from train.mesh import Mesh


def execution_of(config: TrainConfig, mesh: Mesh) -> Execution:
    """How this rank's model computes.

    Raises:
        UserError: `engine.fused` or `engine.loss` asks for what this machine does not have.
    """
    engine = config.engine
    return Execution(
        parallel=SequenceParallel(mesh.sp_group) if mesh.sp_group is not None else None,
        checkpointing=engine.checkpointing,
        offload_checkpoints=engine.offload_checkpoints,
        mlp_tile=engine.mlp_tile,
        pieces=pieces(engine.fused, mesh.device),
        fused_loss=takes_fused(engine.loss, mesh.device),
    )


def exchange_text(config: TrainConfig, name: str) -> str:
    """What sequence parallelism sends in stage `name`, as a line for the log."""
    stage, model, size = config.stages[name], config.model, config.mesh.sequence_parallel
    each = bytes_per_layer(
        stage.micro_batch * stage.seq_len,
        model.num_heads,
        model.num_kv_heads,
        head_dim(model),
        4 if config.engine.precision == "fp32" else 2,
        size,
        passes=2 if config.engine.checkpointing == "none" else 3,
    )
    return f"sequence parallelism over {size} ranks: each sends {each / 2**20:,.3g} MiB per layer and micro-batch"
