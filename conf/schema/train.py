"""`moba train`: stages, what is saved, logged and guarded; and `moba plan`, which takes the same keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from conf.schema.data import DataConfig, StageDataConfig
from conf.schema.engine import EngineConfig, LaunchConfig, MeshConfig, OptimConfig
from conf.schema.model import AttentionConfig, ModelConfig, RopeConfig, StageRopeConfig


@dataclass
class LrConfig:
    """Learning rate of a stage, by tokens seen in it."""

    peak: float = 1e-3
    min_ratio: float = 0.1  # final rate / peak
    warmup: float = 0.02  # fraction of the stage's tokens
    schedule: str = "cosine"  # cosine | linear | constant


@dataclass
class StageConfig:
    """One stage of a recipe: a length, a budget and a plan, on top of the previous stage's weights."""

    seq_len: int = MISSING
    tokens: int = MISSING  # budget; a whole number of global batches
    global_batch: int = MISSING  # sequences per optimizer step, over all ranks and micro-batches
    micro_batch: int = 1  # sequences per rank per forward
    carry_optimizer: bool = True  # keep AdamW's moments of the previous stage
    rope: RopeConfig = field(default_factory=StageRopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    data: StageDataConfig = field(default_factory=StageDataConfig)


@dataclass
class CheckpointConfig:
    every: int = 0  # steps between saves; 0: only at the end of each stage
    keep: int = 2  # newest so many are kept; the last of each stage always is
    background: bool = True  # written while training goes on, from a copy of each rank's share in host memory


@dataclass
class GuardConfig:
    """What to do about bad steps. The update of a bad step is never applied, whatever follows."""

    nonfinite: str = "stop"  # loss or gradient norm: stop | skip the update | rollback to the newest checkpoint
    spike: str = "off"  # off | stop | skip | rollback
    spike_factor: float = 2.0  # a loss above so many times its median over `window` is a spike; 0: none is
    norm_factor: float = 0.0  # the same for the gradient norm; 0: none is
    window: int = 64  # good steps of the stage behind the medians; before there are so many nothing is a spike
    leave_out: int = 1  # rollback: the data of so many steps, the bad one the last, is not trained on again
    limit: int = 10  # skipped steps since the start, or rollbacks of a stage: one more stops the run


@dataclass
class WandbConfig:
    mode: str = "disabled"  # disabled | offline | online
    project: str = "longmoba"
    name: str = ""


@dataclass
class MetricsConfig:
    batch_hash: bool = False  # a hash of each global batch's token ids, equal however it is shared out
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class TrainEvalConfig:
    """Held-out loss during training."""

    every: int = 0  # steps; 0: only at the start of a run and the end of each stage
    tokens: int = 65_536  # held-out tokens read each time; 0: no held-out loss
    buckets: int = 0  # equal parts of the length whose losses are logged too, of full-length documents; 0: none
    gate: bool = False  # log by layer how the gate chose on the first held-out batch


@dataclass
class InitConfig:
    """What the first stage starts from: weights, model section, RoPE and tokenizer. At most one of the two."""

    hf: str = ""  # Hugging Face folder; empty: fresh weights
    checkpoint: str = ""  # run folder, checkpoint or folder made by `moba import`; its optimizer is not taken
    seq_len: int = 0  # filled in: tokens that its model reads with the RoPE of the first stage; 0: unknown


@dataclass
class ResumeConfig:
    """What may differ from the run's `config.yaml` at this start. Never saved: each change is asked for anew."""

    allow: list[str] = field(default_factory=list)  # as [stages.long.attention]; written to changes.jsonl


@dataclass
class TrainConfig:
    """Root of `moba train`."""

    out: str = MISSING  # run folder
    seed: int = 0
    max_steps: Optional[int] = None  # optimizer steps over the whole chain; null: all
    dry_run: bool = False
    init: InitConfig = field(default_factory=InitConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    eval: TrainEvalConfig = field(default_factory=TrainEvalConfig)


@dataclass
class PlanConfig(TrainConfig):
    """Root of `moba plan`: a training configuration, and the GPUs it is meant for."""

    out: str = "runs/plan"  # nothing is written; the results of measured steps are read from benchmarks/results
    gpu: str = "h200"  # a100 | h100 | h200 | b200
    host_gib: float = 0.0  # memory of the machine; 0: unknown, host memory is printed and not checked
