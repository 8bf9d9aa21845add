"""What one field may hold: the choices of enum-like strings and the ranges of numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from conf import schema as s
from conf.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end leaves out the bound itself."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return math.isfinite(value) and above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


CHOICES: dict[tuple[type, str], tuple[str, ...]] = {
    (s.ModelConfig, "family"): ("llama", "mistral", "qwen2", "qwen3"),
    (s.RopeConfig, "kind"): ("default", "linear", "ntk", "llama3", "yarn"),
    (s.StageRopeConfig, "kind"): ("inherit", "default", "linear", "ntk", "llama3", "yarn"),
    (s.AttentionConfig, "kind"): ("full", "moba"),
    (s.AttentionConfig, "choose"): ("moba", "window", "sink_window"),
    (s.AttentionConfig, "backend"): ("auto", "reference", "varlen", "triton"),
    (s.LrConfig, "schedule"): ("cosine", "linear", "constant"),
    (s.StageDataConfig, "packing"): ("concat", "best_fit"),
    (s.StageDataConfig, "unit"): ("weight", "tokens"),
    (s.DomainRule, "long"): ("auto", "split", "truncate", "drop", "error"),
    (s.ReadConfig, "kind"): ("text", "chat", "tokens"),
    (s.ReadConfig, "on_error"): ("skip", "fatal"),
    (s.SyntheticConfig, "loss"): ("answer", "all"),
    (s.EngineConfig, "precision"): ("fp32", "bf16"),
    (s.EngineConfig, "checkpointing"): ("none", "full", "selective"),
    (s.EngineConfig, "fused"): ("none", "liger", "compile"),
    (s.EngineConfig, "loss"): ("auto", "fused", "tiled"),
    (s.LaunchConfig, "kind"): ("local", "hostfile", "slurm"),
    (s.GuardConfig, "nonfinite"): ("stop", "skip", "rollback"),
    (s.GuardConfig, "spike"): ("off", "stop", "skip", "rollback"),
    (s.WandbConfig, "mode"): ("disabled", "offline", "online"),
    (s.ExportConfig, "dtype"): ("float32", "bfloat16"),
    (s.LossSuiteConfig, "spacing"): ("linear", "log"),
    (s.GenerateConfig, "decode"): ("full", "moba"),
    (s.LmEvalConfig, "preset"): ("", "moba_paper"),
    (s.EvalAttentionConfig, "kind"): ("trained", "moba", "full"),
    (s.RulerConfig, "template"): ("base", "meta-chat", "vicuna-chat", "lwm-chat"),
    (s.EvalConfig, "suite"): ("all", "loss", "ruler", "needle", "gate", "lm_eval", "report"),
    (s.EvalConfig, "device"): ("auto", "cpu", "cuda"),
    (s.BenchConfig, "name"): ("attention",),
    (s.BenchConfig, "routing"): ("uniform", "clustered", "sink"),
    (s.PlanConfig, "gpu"): ("a100", "h100", "h200", "b200"),
    (s.StepBenchConfig, "parts"): ("after", "within", "none"),
    (s.StepBenchConfig, "gpu"): ("auto", "a100", "h100", "h200", "b200"),
}

_COUNT = Range(1)
_ZERO_OR_MORE = Range(0)
_POSITIVE = Range(0, open_low=True)
_FRACTION = Range(0, 1)
_BELOW_ONE = Range(0, 1, open_high=True)

RANGES: dict[type, dict[str, Range]] = {
    s.LoaderBenchConfig: {"tokens_per_s": _COUNT, "limit": _FRACTION, "seconds": _POSITIVE},
    s.ModelConfig: {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_layers"), _COUNT),
        **dict.fromkeys(("num_heads", "num_kv_heads"), _COUNT),
        **dict.fromkeys(("norm_eps", "init_std"), _POSITIVE),
        **dict.fromkeys(("head_dim", "key_conv"), _ZERO_OR_MORE),
    },
    s.RopeConfig: {
        "theta": Range(1, open_low=True),
        **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _POSITIVE),
        **dict.fromkeys(("original_seq_len", "attention_factor"), _ZERO_OR_MORE),
        "factor": _COUNT,
    },
    s.StageRopeConfig: {  # 0: inherited; what comes out of it is checked by the line above
        **dict.fromkeys(("theta", "factor"), _ZERO_OR_MORE),
        **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _ZERO_OR_MORE),
    },
    s.AttentionConfig: {
        **dict.fromkeys(("block_size", "topk"), _COUNT),
        **dict.fromkeys(("full_last_layers", "full_every"), _ZERO_OR_MORE),
        **dict.fromkeys(("full_after", "topk_warmup_until"), _FRACTION),
    },
    s.LrConfig: {"peak": _POSITIVE, "min_ratio": _FRACTION, "warmup": _BELOW_ONE},
    s.StageConfig: dict.fromkeys(("seq_len", "tokens", "global_batch", "micro_batch"), _COUNT),
    s.StageDataConfig: {"window": _COUNT},
    s.DomainRule: {**dict.fromkeys(("min_length", "max_length"), _ZERO_OR_MORE), "loss_weight": _POSITIVE},
    s.TokenizerConfig: {"train_vocab_size": Range(300), "train_chars": _COUNT},  # 256 bytes come first
    s.DataSetConfig: {"heldout": _BELOW_ONE},
    s.DataConfig: {"workers": _ZERO_OR_MORE},
    s.ReadConfig: {"repos": _ZERO_OR_MORE, "max_chars": _COUNT},
    s.SyntheticConfig: {"documents": _COUNT, "seed": _ZERO_OR_MORE},
    s.OptimConfig: {
        **dict.fromkeys(("beta1", "beta2"), _BELOW_ONE),
        **dict.fromkeys(("weight_decay", "clip"), _ZERO_OR_MORE),
        "eps": _POSITIVE,
    },
    s.EngineConfig: {"zero_stage": Range(0, 3), "mlp_tile": _ZERO_OR_MORE},
    s.MeshConfig: {"sequence_parallel": _COUNT},
    s.SlurmConfig: dict.fromkeys(("cpus", "grace"), _ZERO_OR_MORE),
    s.LaunchConfig: {
        "nproc": _COUNT,
        "nodes": _COUNT,
        "port": Range(1, 65_535),
        **dict.fromkeys(("threads", "timeout", "max_restarts"), _ZERO_OR_MORE),
    },
    s.GuardConfig: {
        **dict.fromkeys(("spike_factor", "norm_factor", "limit"), _ZERO_OR_MORE),
        **dict.fromkeys(("window", "leave_out"), _COUNT),
    },
    s.CheckpointConfig: {"every": _ZERO_OR_MORE, "keep": _COUNT},
    s.TrainEvalConfig: dict.fromkeys(("every", "tokens", "buckets"), _ZERO_OR_MORE),
    s.TrainConfig: {"seed": Range(0, 2**63 - 1), "max_steps": _COUNT},
    s.PrepareConfig: {"heldout": _BELOW_ONE, "workers": _ZERO_OR_MORE},
    s.InitConfig: {"seq_len": _ZERO_OR_MORE},
    s.LossSuiteConfig: {**dict.fromkeys(("seq_len", "bucket", "trailing"), _ZERO_OR_MORE), "tokens": _COUNT},
    s.RulerConfig: {"samples": _COUNT, "seed": _ZERO_OR_MORE},
    s.NeedleConfig: {"depths": _COUNT, "samples": _COUNT, "seed": _ZERO_OR_MORE},
    s.GenerateConfig: {"batch": _COUNT, "chunk": _ZERO_OR_MORE},
    s.LmEvalConfig: {"shots": Range(-1), "limit": _ZERO_OR_MORE, "max_length": _ZERO_OR_MORE},
    s.BenchConfig: {"documents": _COUNT, "flash_up_to": _ZERO_OR_MORE},
    s.StudyConfig: {"workers": _COUNT, "minutes": _ZERO_OR_MORE},
    s.GateConfig: {"seq_len": _ZERO_OR_MORE, "queries": _COUNT},
    s.PlanConfig: {"host_gib": _ZERO_OR_MORE},
    s.GenerateBenchConfig: {
        **dict.fromkeys(("block_size", "topk", "rows"), _COUNT),
        **dict.fromkeys(("chunk", "full_up_to", "decode_up_to"), _ZERO_OR_MORE),
    },
    s.StepBenchConfig: {"steps": _COUNT, "warmup": _ZERO_OR_MORE},
    s.EvalConfig: {"sequence_parallel": _COUNT},
    s.EvalAttentionConfig: dict.fromkeys(("block_size", "topk"), _ZERO_OR_MORE),
}


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first field of `config`, any schema dataclass, out of bounds.

    `prefix` stands before the keys in messages, as `stages.long.rope.`.
    """
    for owner, name, key, value in _fields(config, prefix):
        line = [cls for cls in owner.__mro__ if dataclasses.is_dataclass(cls)]  # a subclass may say otherwise
        choices = next((CHOICES[cls, name] for cls in line if (cls, name) in CHOICES), None)
        if choices is not None and value not in choices:
            raise UserError(f"{key}={value}: choose one of {', '.join(choices)}")
        allowed = next((RANGES[cls][name] for cls in line if name in RANGES.get(cls, {})), None)
        if allowed is not None and value is not None and not allowed.holds(value):
            raise UserError(f"{key}={value}: must be {allowed}")


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[type, str, str, Any]]:
    """(class, field, dotted key, value) of every leaf below `config`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{key}.")
        elif isinstance(value, dict) and all(dataclasses.is_dataclass(item) for item in value.values()):
            for name, item in value.items():
                yield from _fields(item, f"{key}.{name}.")
        else:
            yield type(config), field.name, key, value
