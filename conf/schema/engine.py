"""How a step is computed, and where: optimizer, memory, processes, machines."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class OptimConfig:
    """AdamW. Weight decay applies to matrices only."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0: off


@dataclass
class EngineConfig:
    """How a step is computed and where things are kept. Beyond rounding, nothing here changes a result.

    Checkpointing `full` keeps each block's input and chosen blocks; `selective` keeps the attention output too, so
    that attention never runs twice.
    """

    zero_stage: int = 1  # 0 | 1 | 2 | 3
    precision: str = "bf16"  # fp32 | bf16
    checkpointing: str = "none"  # none | full | selective: activations computed again in backward
    offload_checkpoints: bool = False  # what checkpointing keeps waits in pinned host memory
    mlp_tile: int = 0  # tokens per tile of the MLP, nothing of which is kept for backward; 0: all at once, kept
    offload_optimizer: bool = False  # fp32 weights and AdamW in host memory, and the step on the CPU
    offload_param: bool = False  # parameters in host memory between uses: ZeRO-3
    fused: str = "none"  # none | liger | compile: norm, RoPE and SwiGLU as Liger's kernels or by torch.compile
    loss: str = "auto"  # auto | fused | tiled: logits once, in large tiles, or twice; auto: fused on CUDA
    deterministic: bool = False  # equal runs give equal bits on a GPU with full attention too, which gets slower


@dataclass
class MeshConfig:
    sequence_parallel: int = 1  # ranks that share each sequence: columns outside attention, heads inside


@dataclass
class SlurmConfig:
    """What `sbatch` is told. The script it gets is written to the run folder, to be read."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""  # limit of a job, as 24:00:00
    gpus: bool = True  # ask for `launch.nproc` GPUs per node
    cpus: int = 0  # per node; 0: the cluster's default
    grace: int = 120  # seconds before the end of the time at which the run is told to save
    extra: list[str] = field(default_factory=list)  # more options, as --constraint=h100
    submit: bool = True  # false: only write the script


@dataclass
class LaunchConfig:
    """Where the workers run: on this machine, on the machines of a file over ssh, or where SLURM puts them."""

    kind: str = "local"  # local | hostfile | slurm
    nodes: int = 1  # machines; local: 1
    nproc: int = 1  # worker processes per machine, one per GPU
    hostfile: str = ""  # lines of `HOST slots=N`, the first `nodes` of which are used
    port: int = 29500  # on the first machine, where the workers of several machines meet
    threads: int = 0  # CPU threads per worker; 0: cores / nproc
    timeout: float = 1800.0  # seconds without a move of some rank until the job stops and names it; 0: never
    max_restarts: int = 0  # starts again from the newest checkpoint after a crash or a stall
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def world(self) -> int:
        """Worker processes in all."""
        return self.nodes * self.nproc
