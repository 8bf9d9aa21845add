"""Every setting longmoba knows, typed, with its default and its unit.

The files of this folder are the only place where defaults live. Hydra composes the YAML groups beside it over
these classes, so an unknown key or a value of the wrong type is an error before anything starts. Rules that
involve more than one field live in `conf.validate`.

Lengths are in tokens and sizes in bytes unless the name says otherwise (`workspace_gib`).
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from conf.schema.bench import BenchConfig, GenerateBenchConfig, LoaderBenchConfig, StepBenchConfig, StudyConfig
from conf.schema.convert import ExportConfig, ImportConfig, PrepareConfig
from conf.schema.data import (
    DataConfig,
    DataSetConfig,
    DomainRule,
    ReadConfig,
    StageDataConfig,
    SyntheticConfig,
    TokenizerConfig,
)
from conf.schema.engine import EngineConfig, LaunchConfig, MeshConfig, OptimConfig, SlurmConfig
from conf.schema.evaluate import (
    EvalAttentionConfig,
    EvalConfig,
    GateConfig,
    GenerateConfig,
    LmEvalConfig,
    LossSuiteConfig,
    NeedleConfig,
    RulerConfig,
)
from conf.schema.model import AttentionConfig, ModelConfig, RopeConfig, StageRopeConfig
from conf.schema.train import (
    CheckpointConfig,
    GuardConfig,
    InitConfig,
    LrConfig,
    MetricsConfig,
    PlanConfig,
    ResumeConfig,
    StageConfig,
    TrainConfig,
    TrainEvalConfig,
    WandbConfig,
)

__all__ = [
    "ROOTS",
    "AttentionConfig",
    "BenchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DataSetConfig",
    "DomainRule",
    "EngineConfig",
    "EvalAttentionConfig",
    "EvalConfig",
    "ExportConfig",
    "GateConfig",
    "GenerateBenchConfig",
    "GenerateConfig",
    "GuardConfig",
    "ImportConfig",
    "InitConfig",
    "LaunchConfig",
    "LmEvalConfig",
    "LoaderBenchConfig",
    "LossSuiteConfig",
    "LrConfig",
    "MeshConfig",
    "MetricsConfig",
    "ModelConfig",
    "NeedleConfig",
    "OptimConfig",
    "PlanConfig",
    "PrepareConfig",
    "ReadConfig",
    "ResumeConfig",
    "RopeConfig",
    "RulerConfig",
    "SlurmConfig",
    "StageConfig",
    "StageDataConfig",
    "StageRopeConfig",
    "StepBenchConfig",
    "StudyConfig",
    "SyntheticConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainEvalConfig",
    "WandbConfig",
    "register",
]

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
