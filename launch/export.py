"""`moba export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import ExportConfig
from launch.command import Command


def resolve(overrides: Sequence[str]) -> ExportConfig:
    return compose("export", overrides)


def run(config: ExportConfig) -> int:
    from model.hf import export_hf

    check_fields(config)
    print(f"wrote {export_hf(Path(config.checkpoint), Path(config.out), config.dtype)}")
    return 0


COMMAND = Command(
    name="export",
    summary="write a checkpoint as a Hugging Face folder",
    text="""
Writes config.json, safetensors and the tokenizer: transformers.AutoModelForCausalLM loads the folder without
remote code (and runs full attention).
""",
    examples=(
        "moba export checkpoint=runs/x out=runs/x/hf",
        "moba export checkpoint=runs/x/checkpoints/step-00000120 out=hf dtype=bfloat16",
    ),
    resolve=resolve,
    run=run,
)
