"""Every setting longmoba knows, typed, with its default and its unit.

This file is the only place where defaults live. Hydra composes the YAML groups beside it over these
classes, so an unknown key or a value of the wrong type is an error before anything starts. Rules that
involve more than one field live in `conf.validate`.

Lengths are in tokens and sizes in bytes unless the name says otherwise (`workspace_gib`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ModelConfig:
    """Shape of a Llama-like decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU)."""

    family: str = "llama"  # llama | mistral | qwen2 | qwen3: the Hugging Face class an export uses
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = 0  # 0: hidden_size / num_heads
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    key_conv: int = 0  # causal convolution of keys, kernel 3 or 5 (arXiv 2511.11571); 0: none
    init_std: float = 0.02


@dataclass
class RopeConfig:
    """Rotary position embedding of a stage. `kind` names follow transformers' `rope_type`."""

    kind: str = "default"  # default | linear | ntk | llama3 | yarn (a theta change alone is `default`)
    theta: float = 10_000.0
    factor: float = 1.0
    original_seq_len: int = 0  # length before scaling: llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn: factor on cos and sin; 0: 0.1 ln(factor) + 1


@dataclass
class StageRopeConfig(RopeConfig):
    """RoPE of a stage: what it leaves at `inherit` or 0 is taken over, as `conf.inherit` says.

    With `kind=inherit` every field left at 0 is that of the stage before (of `init` for the first stage; without
    `init` plain RoPE). With another kind only theta is taken over, and the rest has the defaults of the kind.
    """

    kind: str = "inherit"  # inherit | default | linear | ntk | llama3 | yarn
    theta: float = 0.0  # 0: inherit; another theta alone is adjusted base frequency (ABF)
    factor: float = 0.0  # new length / original length; linear is position interpolation
    low_freq_factor: float = 0.0  # llama3
    high_freq_factor: float = 0.0  # llama3
    beta_fast: float = 0.0  # yarn
    beta_slow: float = 0.0  # yarn


@dataclass
class AttentionConfig:
    """Which layers use MoBA, with what blocks, when, and through which kernels.

    `topk` counts the query's own block. Fractions are of the stage's tokens.
    """

    kind: str = "full"  # full | moba
    backend: str = "auto"  # auto | reference | varlen | triton
    block_size: int = 512
    topk: int = 3
    choose: str = "moba"  # moba: the gate | window: topk - 1 blocks before | sink_window: first, topk - 2 before
    full_last_layers: int = 0  # the last n layers stay full
    full_every: int = 0  # every n-th layer stays full; 0: none
    full_layers: list[int] = field(default_factory=list)  # these layers stay full
    full_after: float = 1.0  # from this fraction on, every layer is full; 1: never
    topk_warmup: list[int] = field(default_factory=list)  # topk values stepped through before `topk`
    topk_warmup_until: float = 0.0  # the steps above share this first fraction evenly


@dataclass
class LrConfig:
    """Learning rate of a stage, by tokens seen in it."""

    peak: float = 1e-3
    min_ratio: float = 0.1  # final rate / peak
    warmup: float = 0.02  # fraction of the stage's tokens
    schedule: str = "cosine"  # cosine | linear | constant


@dataclass
class DomainRule:
    """What of its set a domain uses. Lengths are of documents, in tokens, with the eos that ends each."""

    set: str = ""  # key of data.sets; empty: the domain's own name
    min_length: int = 0  # shorter documents are left out
    max_length: int = 0  # longer documents are left out; 0: none
    long: str = "auto"  # documents above seq_len: split | truncate | drop | error; auto: split text, drop chats
    upsample: dict[int, float] = field(default_factory=dict)  # documents of at least N tokens: times per epoch
    loss_weight: float = 1.0  # of the domain's tokens in the loss, times their own weights


@dataclass
class StageDataConfig:
    """What a stage trains on. Domains are keyed by name; each points to a folder made by `moba prepare`."""

    domains: dict[str, float] = field(default_factory=dict)  # name -> weight; a name is a key of data.sets
    rules: dict[str, DomainRule] = field(default_factory=dict)  # domain -> what of its set it uses
    unit: str = "weight"  # of the numbers in domains: weight | tokens, which must add up to the stage's
    packing: str = "concat"  # concat: concatenate and split | best_fit: whole documents, where they fit best
    window: int = 65_536  # best_fit: documents sorted by length at a time, a quarter of the set at most
    balance: bool = True  # share the rows of a global batch out by attention cost, not in their order


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
class TokenizerConfig:
    """Tokenizer: an existing folder or model file, or one trained by `moba prepare`."""

    path: str = ""  # Hugging Face folder or sentencepiece .model; empty: train one
    train_vocab_size: int = 4096  # when training
    train_chars: int = 20_000_000  # at most so many characters are read for training


@dataclass
class ReadConfig:
    """How the records of a source become documents."""

    kind: str = "text"  # text | chat: conversations, with loss on the assistant's turns | tokens: lists of ids
    field: str = ""  # of JSONL, parquet, arrow, hub records; empty: text, for chat messages, for tokens input_ids
    weight: str = ""  # field with the weight of the loss: of a record, a message or a list by ids; empty: none
    repos: int = 0  # n: each folder n levels below the source is one document, a code repository; 0: files are
    subset: str = ""  # configuration of a hub data set
    split: str = "train"  # of a hub data set
    max_chars: int = 50_000_000  # a longer document is a bad record
    on_error: str = "skip"  # a bad record: skip (counted and listed in skipped.jsonl) | fatal


@dataclass
class SyntheticConfig:
    """Retrieval tasks made up for training: `source: synthetic`. Lengths are of whole documents."""

    tasks: list[str] = field(default_factory=lambda: ["needle", "multikey", "tracking", "copy"])
    lengths: list[int] = field(default_factory=lambda: [4096])  # each task in each length, nearly filled
    documents: int = 1000  # per task and length
    loss: str = "answer"  # answer | all: on which tokens loss is taken
    seed: int = 0


@dataclass
class DataSetConfig:
    """One prepared set of documents and, if it may be prepared on demand, where its text comes from."""

    path: str = MISSING  # folder with manifest.json and token shards
    source: str = ""  # stdlib | a folder or file | hub:NAME | synthetic; empty: the set must exist
    heldout: float = 0.05  # share of documents kept for evaluation, chosen by hash; 0: none
    read: ReadConfig = field(default_factory=ReadConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass
class DataConfig:
    sets: dict[str, DataSetConfig] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    workers: int = 0  # processes that tokenise; 0: one per core, fewer for little text


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
class PrepareConfig:
    """Root of `moba prepare`: one set of documents, tokenised."""

    out: str = MISSING
    source: str = MISSING  # stdlib | a folder or file | hub:NAME | synthetic
    heldout: float = 0.05  # share of documents kept for evaluation, chosen by hash; 0: none
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    workers: int = 0  # processes that tokenise; 0: one per core, fewer for little text


@dataclass
class ExportConfig:
    """Root of `moba export`: a checkpoint as a Hugging Face folder."""

    checkpoint: str = MISSING  # a run folder or one of its checkpoints
    out: str = MISSING
    dtype: str = "float32"  # float32 | bfloat16


@dataclass
class ImportConfig:
    """Root of `moba import`: a Hugging Face folder as a checkpoint."""

    hf: str = MISSING  # Hugging Face folder: Llama, Mistral, Qwen2 or Qwen3
    out: str = MISSING  # folder of the checkpoint
    tokenizer: str = ""  # folder or sentencepiece .model, where the folder has none of its own


@dataclass
class LossSuiteConfig:
    seq_len: int = 0  # 0: the length of the checkpoint's last stage
    tokens: int = 262_144  # held-out tokens read
    bucket: int = 0  # tokens per position bucket; 0: seq_len / 16
    spacing: str = "linear"  # linear | log: buckets that double from `bucket` on
    trailing: int = 0  # last so many tokens of full-length documents; 0: seq_len / 16


@dataclass
class RulerConfig:
    tasks: list[str] = field(default_factory=lambda: ["niah_single_1", "vt", "fwe"])
    lengths: list[int] = field(default_factory=list)  # prompt and answer together; empty: the checkpoint's length
    samples: int = 500
    seed: int = 42
    template: str = "base"  # text around the prompt: base | meta-chat | vicuna-chat | lwm-chat
    data: str = ""  # folder with essays, squad.json, hotpotqa.json; local: text of this machine, as `ruler-local`
    prompts: str = ""  # folder of RULER's own LENGTH/TASK/validation.jsonl to answer; empty: prompts are made


@dataclass
class NeedleConfig:
    """One needle at chosen depths of haystacks of chosen lengths (MoBA paper, figure 7)."""

    lengths: list[int] = field(default_factory=list)  # prompt + answer; empty: the checkpoint's and 1/8, 1/4, 1/2
    depths: int = 11  # from the first line of the haystack to the last, evenly spaced
    samples: int = 4  # per length and depth
    seed: int = 42


@dataclass
class GateConfig:
    """Which blocks queries choose, on one long held-out document."""

    seq_len: int = 0  # 0: as loss.seq_len
    queries: int = 512  # so many queries are compared with full attention
    block_sizes: list[int] = field(default_factory=list)  # of the grid of what-ifs; empty: seq_len / 8 to / 64
    topks: list[int] = field(default_factory=lambda: [2, 3, 4, 8])  # of the grid: blocks with the own one


@dataclass
class GenerateConfig:
    """How prompts are answered, in every suite that generates."""

    batch: int = 8  # prompts answered at a time
    chunk: int = 65_536  # prompt tokens of all rows run at a time: bounds memory, changes no token; 0: all
    share: bool = True  # run what prompts share once, within a batch and with the last: a row more of cache
    decode: str = "full"  # full (as in the MoBA paper) | moba: attention of the MoBA plans after the prompt


@dataclass
class LmEvalConfig:
    """Tasks of EleutherAI's lm-eval harness."""

    preset: str = ""  # moba_paper: the paper's table 2 with its shot counts; tasks= adds to it
    include: str = ""  # folder of task YAML files of your own
    shots: int = -1  # examples in the prompt; -1: as each task says
    limit: int = 0  # documents per task; 0: all
    code: bool = False  # run code that the model writes, on this machine: HumanEval and MBPP need it
    max_length: int = 0  # tokens of prompt and answer, the oldest are cut off; 0: the checkpoint's length


@dataclass
class EvalAttentionConfig(AttentionConfig):
    """The attention that is compared with full attention, on the same weights."""

    kind: str = "trained"  # trained: its own MoBA layers | moba: exactly these settings | full: no MoBA
    block_size: int = 0  # 0: as trained
    topk: int = 0  # 0: as trained


@dataclass
class EvalConfig:
    """Root of `moba eval`."""

    checkpoint: Any = MISSING  # run folder, checkpoint or Hugging Face folder; a list [A, B] is compared
    out: str = MISSING
    suite: str = "all"  # all (loss, RULER, gate) | loss | ruler | needle | gate | lm_eval | report
    tasks: list[str] = field(default_factory=list)  # of suite=lm_eval
    dataset: str = ""  # folder of a prepared set; empty: the one the run was trained on
    device: str = "auto"  # auto | cpu | cuda
    sequence_parallel: int = 1  # processes of this machine that share each prompt and each row, one per GPU
    attention: EvalAttentionConfig = field(default_factory=EvalAttentionConfig)
    loss: LossSuiteConfig = field(default_factory=LossSuiteConfig)
    ruler: RulerConfig = field(default_factory=RulerConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass
class PlanConfig(TrainConfig):
    """Root of `moba plan`: a training configuration, and the GPUs it is meant for."""

    out: str = "runs/plan"  # nothing is written; the results of measured steps are read from benchmarks/results
    gpu: str = "h200"  # a100 | h100 | h200 | b200
    host_gib: float = 0.0  # memory of the machine; 0: unknown, host memory is printed and not checked


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


ROOTS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "export": ExportConfig,
    "bench_loader": LoaderBenchConfig,
    "import": ImportConfig,
    "eval": EvalConfig,
    "plan": PlanConfig,
    "bench_step": StepBenchConfig,
    "bench_generate": GenerateBenchConfig,
    "bench": BenchConfig,
    "study": StudyConfig,
}


def register() -> None:
    """Put the root schemas into Hydra's ConfigStore under `<command>_schema` (idempotent)."""
    store = ConfigStore.instance()
    for name, cls in ROOTS.items():
        store.store(name=f"{name}_schema", node=cls)
