"""Where things lie in a run folder. Every package asks here instead of joining names itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """A run folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `eval/`, `hf/`, `report.html` and others."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def changes(self) -> Path:
        return self.root / "changes.jsonl"  # what `resume.allow` let change, and at which step

    @property
    def logs(self) -> Path:
        return self.root / "logs"  # what workers other than the first print

    @property
    def heartbeat(self) -> Path:
        return self.logs / "heartbeat"  # where every rank stands

    @property
    def guard(self) -> Path:
        return self.root / "guard.jsonl"  # rollbacks, and the data they leave out

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def eval(self) -> Path:
        return self.root / "eval"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


@dataclass(frozen=True)
class CheckpointPaths:
    """One checkpoint folder, `checkpoints/step-00000120`: plain JSON, YAML and safetensors, no pickles.

    `manifest.json` is written last; a folder without it is not a checkpoint.
    """

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps; names sort by step."""
    return f"step-{step:08d}"
