"""`moba eval`: a section for each suite."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from conf.schema.model import AttentionConfig


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
