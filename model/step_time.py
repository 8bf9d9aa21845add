"""Seconds of a training step, part by part, from counted operations and bytes and the rates of a GPU.

Parts run one after the other on a GPU's queue, so they add up. Copies to host memory run beside the computation
and count only as far as they outlast it; collectives count in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import log2

from conf.gpus import Gpu
from model.flops import attended_pairs, matmul_parameters
from model.memory import Job, StepMemory
from model.schedule import LayerPlan
from model.sequence_parallel import bytes_per_layer
from model.shapes import head_dim, num_parameters

# Bytes moved through device memory per parameter by AdamW and by what is done around it: the norm and, where they
# are passes of their own, the sum into fp32 gradients and the cast back. On an H200 with 1.24e9 parameters: 10 ms
# in ZeRO-1 and bf16 (`train.bf16`; at more than the share of the bandwidth that the planner counts on), 36 ms with
# DeepSpeed's optimizer as it comes, which stands for the other stages.
LEAN_OPTIMIZER_BYTES, OPTIMIZER_BYTES = 30, 105
HOST_OPTIMIZER_RATE = 1.5e9  # parameters/s of AdamW on a host's cores, gradient and weight copies included


@dataclass(frozen=True)
class AttentionRate:
    """Useful FLOP/s of the attention operator, forward (gate and lists included) and backward, where measured."""

    head_dim: int
    block_size: int  # 0: full attention
    seq_len: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches of its ceilings. The defaults are typical of Hopper; measured ones replace them.

    Attributes:
        matmul: share of the peak in projections and MLP. loss, tiled_loss: the same in output head and loss, fused
            and not: the products of the latter alternate with passes over fp32 logits.
        bandwidth: share of the memory bandwidth in everything that only moves data.
        link: share of the link's bandwidth in collectives.
        attention: measured points; the nearest one is used.
    """

    matmul: float = 0.70
    loss: float = 0.62
    tiled_loss: float = 0.27
    bandwidth: float = 0.75
    link: float = 0.6
    attention: tuple[AttentionRate, ...] = ()
    sources: tuple[str, ...] = field(default=("typical values",))


@dataclass(frozen=True)
class StepTime:
    """Seconds by part and useful FLOPs by part, of one rank and one optimizer step."""

    seconds: dict[str, float]
    flops: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def step_time(job: Job, gpu: Gpu, rates: Rates, memory: StepMemory, accumulation: int = 1) -> StepTime:
    """Predicted time of one optimizer step of `accumulation` micro-batches on every rank."""
    move = gpu.bandwidth * rates.bandwidth
    model, engine, tokens = job.model, job.engine, job.local
    head = model.hidden_size * model.vocab_size
    layers = matmul_parameters(model) - head
    forward, backward = _attention(job, gpu, rates)
    if engine.checkpointing == "full":
        backward += forward
    seconds = {
        "projections, MLP": block_flops(job) / (gpu.flops * rates.matmul),
        "attention": forward + backward,
        "norm, RoPE, SwiGLU": tokens * model.num_layers * _moved(job) / move,
        "loss": loss_flops(job) / (gpu.flops * (rates.loss if job.fused_loss else rates.tiled_loss)),
        "communication": _micro_communication(job) / (gpu.link * rates.link),
    }
    seconds = {part: spent * accumulation for part, spent in seconds.items()}
    computing = sum(seconds.values())
    copies = 2 * memory.host * accumulation / gpu.host_link if engine.offload_checkpoints else 0.0
    seconds["waiting for host memory"] = max(0.0, copies - computing)
    seconds["communication"] += _step_communication(job) / (gpu.link * rates.link)
    share = num_parameters(model) / job.world
    seconds["optimizer"] = (LEAN_OPTIMIZER_BYTES if job.lean_optimizer else OPTIMIZER_BYTES) * share / move
    if engine.offload_optimizer:
        seconds["optimizer"] = share / HOST_OPTIMIZER_RATE
    flops = {
        "projections, MLP": 6.0 * tokens * layers * accumulation,
        "attention": 3.0 * sum(_pair_flops(job, plan) for plan in job.plans) * accumulation,
        "loss": 6.0 * tokens * head * accumulation,
    }
    return StepTime(seconds, flops)


def block_flops(job: Job) -> float:
    """FLOPs of projections and MLP of all blocks in a micro-batch, those that are computed twice included."""
    layers = matmul_parameters(job.model) - job.model.hidden_size * job.model.vocab_size
    return 2.0 * job.local * layers * (3 + _recomputed(job))


def loss_flops(job: Job) -> float:
    """FLOPs of head and loss in a micro-batch: logits, twice unless fused, and two products for gradients."""
    return (6.0 if job.fused_loss else 8.0) * job.local * job.model.hidden_size * job.model.vocab_size


def _recomputed(job: Job) -> float:
    """Share of the block's matrix products that backward computes again."""
    model, engine = job.model, job.engine
    mlp = 3 * model.hidden_size * model.intermediate_size
    attention = model.hidden_size * 2 * (job.q_width + job.kv_width)
    again = 0.0
    if engine.checkpointing != "none":
        again += attention + (0 if engine.mlp_tile else mlp * 2 / 3)  # the last projection's output is not needed
    if engine.mlp_tile:
        again += mlp * 2 / 3
    return again / (attention + mlp)


def _moved(job: Job) -> float:
    """Bytes that norms, RoPE, residual sums and SwiGLU move per token and layer, over all passes."""
    model, size, fused = job.model, job.itemsize, job.engine.fused != "none"
    rope_width = job.q_width + job.kv_width
    forward = (10 * model.hidden_size + (3 if fused else 5) * model.intermediate_size) * size
    forward += rope_width * (2 * size if fused else 2 * size + 24)
    backward = (16 * model.hidden_size + (5 if fused else 8) * model.intermediate_size) * size
    backward += rope_width * (2 * size if fused else 2 * size + 24)
    return forward * (1 if job.engine.checkpointing == "none" else 2) + backward


_pairs = cache(attended_pairs)  # a search asks for the same few many times


def _pair_flops(job: Job, plan: LayerPlan) -> float:
    """Forward FLOPs of one layer's selected pairs on one rank."""
    pairs = _pairs(job.seq_len, plan) * job.rows
    return 4.0 * head_dim(job.model) * pairs * job.model.num_heads / job.parallel


def _attention(job: Job, gpu: Gpu, rates: Rates) -> tuple[float, float]:
    """Seconds forward and backward, over all layers."""
    forward = backward = 0.0
    for plan in set(job.plans):
        rate = _nearest(job, plan, rates)
        work = _pair_flops(job, plan) * job.plans.count(plan)
        forward += work / (rate.forward if rate else 0.45 * gpu.flops)
        backward += 2 * work / (rate.backward if rate else 0.45 * gpu.flops)
    return forward, backward


def _nearest(job: Job, plan: LayerPlan, rates: Rates) -> AttentionRate | None:
    """The measured point closest to a layer's shape: same kind, then head_dim, block size and length."""
    dim, block = head_dim(job.model), plan.block_size
    kind = [rate for rate in rates.attention if bool(rate.block_size) == bool(block)]

    def distance(rate: AttentionRate) -> tuple[float, float]:
        blocks = abs(log2(rate.block_size / block)) if block else 0.0
        return blocks + 4 * abs(log2(rate.head_dim / dim)), abs(log2(rate.seq_len / job.seq_len))

    return min(kind, key=distance, default=None)


def _micro_communication(job: Job) -> float:
    """Bytes each rank sends in a micro-batch: sequence parallelism, and ZeRO-3's gathering of parameters."""
    passes = 2 if job.engine.checkpointing == "none" else 3
    sent = 0.0
    if job.parallel > 1:
        model = job.model
        sent += model.num_layers * bytes_per_layer(
            job.tokens, model.num_heads, model.num_kv_heads, head_dim(model), job.itemsize, job.parallel, passes
        )
    if job.engine.zero_stage == 3:
        sent += passes * num_parameters(job.model) * job.itemsize * (job.world - 1) / job.world
    return sent


def _step_communication(job: Job) -> float:
    """Bytes each rank sends in an optimizer step: gradients out, updated parameters back."""
    return 2.0 * num_parameters(job.model) * job.itemsize * (job.world - 1) / job.world
