"""`moba bench` and `moba study`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schema.engine import EngineConfig, LaunchConfig, MeshConfig, OptimConfig
from conf.schema.model import AttentionConfig, ModelConfig


@dataclass
class StepBenchConfig:
    """Root of `moba bench step`: whole optimizer steps on synthetic tokens, a sequence per data-parallel rank."""

    out: str = "benchmarks/results/step.json"  # other configurations' rows in it are kept; the plot goes beside
    lengths: list[int] = field(default_factory=lambda: [8192])  # tokens of the sequence
    plans: list[str] = field(default_factory=lambda: ["full", "512x3"])  # full or BLOCKxTOPK
    sweep: list[str] = field(default_factory=list)  # rows TOKENS/PLAN[/KEY:VALUE...] in place of the above
    steps: int = 3  # timed steps; their median counts
    warmup: int = 1  # steps before them
    parts: str = "after"  # after: one more step that times each part | within: the timed steps do | none
    gpu: str = "auto"  # auto | a100 | h100 | h200 | b200: whose peak rate and memory
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)  # kind, block_size, topk: as the plan says
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


@dataclass
class BenchConfig:
    """Root of `moba bench`: what is measured, on which rows."""

    name: str = "attention"  # attention
    rows: list[str] = field(default_factory=list)  # seq_len/heads/kv_heads/head_dim/block/topk; empty: official
    documents: int = 1  # packed documents per row; dense attention is timed for 1 only
    routing: str = "uniform"  # uniform | clustered | sink: how the random inputs make the gate choose
    dense: bool = True  # time dense attention beside it
    rule: bool = False  # measure where the union path beats the routed one, and store that rule
    flash_up_to: int = 131_072  # tokens up to which the flash backend is timed too
    out: str = ""  # JSON file; empty: only the table
    plot: bool = True  # a PNG beside the JSON


@dataclass
class GenerateBenchConfig:
    """Root of `moba bench generate`: prefill and decode of a model with random weights, by prompt length."""

    out: str = "benchmarks/results/generate.json"  # the plot goes beside
    lengths: list[int] = field(default_factory=lambda: [8192, 32_768, 131_072])  # tokens of the prompt
    block_size: int = 4096  # of the MoBA layers, all of them
    topk: int = 12
    chunk: int = 65_536  # prompt tokens run at a time
    full_up_to: int = 131_072  # tokens up to which full attention prefills for real; above, one layer's attention
    decode_up_to: int = 131_072  # tokens up to which decoding is measured
    rows: int = 1  # prompts decoded at a time
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass
class LoaderBenchConfig:
    """Root of `moba bench loader`."""

    tokens_per_s: int = 60_000  # of the training step that is to be fed
    limit: float = 0.01  # share of its time that a step may wait
    seq_lens: list[int] = field(default_factory=lambda: [8192, 131_072])
    set_tokens: list[int] = field(default_factory=lambda: [8_000_000, 64_000_000])  # sizes of the set
    seconds: float = 8.0  # of each measurement
    out: str = ""  # JSON file; empty: only the lines


@dataclass
class StudyConfig:
    """Root of `moba study NAME`: a plan of conf/study/, run at one of its scales."""

    name: str = MISSING  # parity, trailing, granularity, sft_hybrid, extension or speed; list shows them
    scale: str = "tiny"  # of the plan: tiny (a CPU, a minute), h200 (one GPU, minutes), or one you add
    out: str = ""  # of page, JSON and plots; empty: docs/results/NAME, for tiny runs/study/NAME-tiny/results
    runs: str = ""  # run folders of the arms; empty: runs/study/NAME-SCALE
    dataset: str = ""  # folder of the prepared sets; empty: runs/data/study-CHARS, made when it is not there
    text: list[str] = field(default_factory=list)  # folders of text, a package each; empty: what Python has here
    arms: list[str] = field(default_factory=list)  # only arms whose names begin so; empty: all
    seeds: list[int] = field(default_factory=list)  # empty: those of the scale
    set: list[str] = field(default_factory=list)  # more overrides of `moba train`, in every arm
    workers: int = 1  # processes side by side on this machine, each with arms of its own
    joined: bool = True  # arms one after another in a worker's process; false: each a `moba train` of its own
    minutes: float = 0.0  # after so many no arm is begun; 0: no limit
    report: bool = False  # only the page and the plots, from the results that are there
