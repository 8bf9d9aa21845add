"""Held-out loss during training: deterministic batches, dealt out to the data-parallel ranks, sums reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.constants import IGNORE_INDEX
from conf.schema import StageConfig, TrainEvalConfig
from data.batch import Batch
from data.loader import heldout_batches
from data.store import TokenStore
from eval.gate_load import GateLoad
from eval.loss import sum_losses, whole_row_losses
from model.schedule import LayerPlan
from model.transformer import CausalLM
from train.engine import DeepSpeedEngine
from train.mesh import Mesh
from train.metrics import Row


def share(batches: Sequence[Batch], rank: int, world: int) -> list[Batch]:
    """Every `world`-th batch. All ranks get the same number, filled up with batches without any label:
    under ZeRO-3 each forward is collective."""
    mine = list(batches[rank::world])
    if len(mine) < -(-len(batches) // world):
        blank = batches[-1]
        mine.append(replace(blank, labels=torch.full_like(blank.labels, IGNORE_INDEX)))
    return mine


class WholeRows:
    """A model whose ranks hold some columns each, asked for whole rows: each computes its columns, all get all.

    `gate` looks at the choices of the first call.
    """

    def __init__(self, model: CausalLM, gate: GateLoad | None = None) -> None:
        self._model, self._gate = model, gate

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        plans: tuple[LayerPlan, ...],
    ) -> Tensor:
        """As `CausalLM.token_losses`, fp32 [R, S]. Collective within the sequence-parallel group."""
        probe = None
        if self._gate is not None:
            self._gate.cu_seqlens, probe, self._gate = cu_seqlens, self._gate.probe, None
        rows = (input_ids, labels, positions, cu_seqlens, max_seqlen)
        return whole_row_losses(self._model, *rows, plans, probe)


class Heldout:
    """Held-out documents of the stage's domains, packed to its length; `config.tokens` of them in all."""

    def __init__(
        self, stores: Sequence[TokenStore], stage: StageConfig, config: TrainEvalConfig, mesh: Mesh
    ) -> None:
        each = max(config.tokens // max(len(stores), 1), stage.seq_len)
        batches = [b for store in stores for b in heldout_batches(store, stage.seq_len, each, stage.micro_batch)]
        self._mine = share(batches, mesh.dp_rank, mesh.dp_world) if batches else []
        self._seq_len, self._mesh, self._config = stage.seq_len, mesh, config

    def evaluate(self, engine: DeepSpeedEngine, plans: tuple[LayerPlan, ...]) -> Row:
        """Mean loss in nats per token under `plans`, and the tokens behind it. Collective.

        Without held-out documents the loss is None. With `eval.buckets` the losses of full-length documents by
        position are added, with `eval.gate` what the gate chose in the first batch, by layer.
        """
        engine.eval()
        gate = GateLoad.zeros(plans, self._mesh.device) if self._config.gate else None
        sums = sum_losses(
            WholeRows(engine.module, gate),
            self._mine,
            {"now": plans},
            bucket=-(-self._seq_len // max(self._config.buckets, 1)),
            trailing=max(1, self._seq_len // 16),
            seq_len=self._seq_len,
            device=self._mesh.device,
        )["now"]
        engine.train()
        if self._mesh.sp_rank:  # the whole group has the same sums: they count once
            sums.table.zero_()
        dist.all_reduce(sums.table)
        report = sums.report()
        row: dict[str, Any] = {"heldout_loss": report.heldout.loss, "heldout_tokens": report.heldout.tokens}
        if report.trailing.tokens:
            row |= {"trailing_loss": report.trailing.loss, "trailing_tokens": report.trailing.tokens}
        if self._config.buckets:
            row["bucket_ends"] = [bucket.end for bucket in report.buckets]
            row["bucket_losses"] = [bucket.estimate.loss for bucket in report.buckets]
            row["bucket_tokens"] = [bucket.estimate.tokens for bucket in report.buckets]
        if gate is not None:  # each rank of a sequence-parallel group counted its own heads
            dist.all_reduce(gate.table)
            row |= {f"gate_{name}": layers for name, layers in gate.report().items()}
        return row
