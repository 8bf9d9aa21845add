"""A model to evaluate, from a run folder, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from conf.domains import set_of
from conf.errors import UserError
from conf.inherit import stage_ropes
from conf.load import load_train_config
from conf.paths import CheckpointPaths, RunPaths
from conf.schema import EvalAttentionConfig, ModelConfig, RopeConfig, TrainConfig
from conf.validate_stage import BLOCK_MULTIPLE
from data.tokenizer import Tokenizer, load_tokenizer
from eval.generate import generate
from eval.group import Group
from eval.moba_settings import checked_moba
from eval.prefixes import Prefixes
from model.execution import PLAIN, Execution
from model.hf import moba_settings, read_hf
from model.schedule import FULL, LayerPlan, check_chooser, full_plans, plan
from model.transformer import CausalLM
from model.weights import find_checkpoint, load_weights, read_weights


@dataclass(frozen=True)
class Source:
    """What is known of a checkpoint before its weights are read.

    Attributes:
        kind: "checkpoint" or "hf".
        path: the checkpoint itself, or the Hugging Face folder.
        rope: of the checkpoint's stage.
        seq_len: length of the checkpoint's stage, or `max_position_embeddings` of the folder.
        moba: block_size, topk, layers (and choose) of the last MoBA stage; None if there was none.
        data: prepared sets the stage was trained on, heaviest first: (name, folder).
        run: the run folder, if the checkpoint lies in one.
        fingerprint: changes with the weights.
    """

    kind: str
    path: Path
    name: str
    config: ModelConfig
    rope: RopeConfig
    seq_len: int
    moba: dict[str, Any] | None
    data: tuple[tuple[str, Path], ...]
    tokenizer: Path
    run: Path | None
    fingerprint: str
    step: int | None = None
    tokens: int | None = None
    stage: str = ""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, on its device, with its tokenizer and origin.

    With several processes `group` shares its work out; `model` has the same weights and computes alone.
    """

    model: CausalLM
    tokenizer: Tokenizer
    source: Source
    group: Group | None = None
    prefixes: Prefixes = field(default_factory=Prefixes)

    @property
    def losses(self) -> CausalLM | Group:
        """What computes the losses of long rows."""
        return self.group or self.model

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        """`eval.generate.generate`, shared out where there is a group."""
        if self.group is not None:
            return self.group.generate(prompts, **settings)
        return generate(self.model, prompts, prefixes=self.prefixes, **settings)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def bos(self) -> int | None:
        """The token that the tokenizer itself puts in front of a prompt, or None."""
        return self.tokenizer.first_id


def find_source(path: Path) -> Source:
    """Look at a run folder, one of its checkpoints (the newest valid one is taken) or a Hugging Face folder.

    Raises:
        UserError: it is none of these, or damaged.
    """
    if (path / "config.json").is_file():
        return _hf_source(path)
    checkpoint = find_checkpoint(path)
    paths = CheckpointPaths(checkpoint)
    config = load_train_config(paths.config)
    state = json.loads(paths.state.read_text(encoding="utf-8"))
    if state["stage"] not in config.stages:
        raise UserError(f"{checkpoint}: stage {state['stage']} of state.json is not in config.yaml")
    stage = config.stages[state["stage"]]
    run = checkpoint.parent.parent
    in_run = RunPaths(run).checkpoints == checkpoint.parent
    return Source(
        kind="checkpoint",
        path=checkpoint,
        name=f"{run.name} {checkpoint.name}" if in_run else checkpoint.name,
        config=config.model,
        rope=stage_ropes(config.stages)[state["stage"]],
        seq_len=stage.seq_len,
        moba=moba_settings(config, state["stage"]),
        data=_sets(config, state["stage"]),
        tokenizer=paths.tokenizer,
        run=run if in_run else None,
        fingerprint=hashlib.sha256(paths.manifest.read_bytes()).hexdigest(),
        step=state["step"],
        tokens=state["tokens"],
        stage=state["stage"],
    )


def load_model(
    path: Path, device: str = "auto", backend: str = "auto", dtype: torch.dtype | None = None
) -> Loaded:
    """Find and load; see `find_source`.

    Args:
        device: auto (CUDA if there is one) | cpu | cuda.
        backend: attention backend, as in `model.dispatch`.
        dtype: of the weights; None: float32 on the CPU, bfloat16 on CUDA.

    Raises:
        UserError: nothing usable at `path`, or no such device.
    """
    return load_source(find_source(path), device, backend, dtype)


def load_source(
    source: Source,
    device: str = "auto",
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    execution: Execution = PLAIN,
) -> Loaded:
    """Read the weights of `source`, tensor by tensor, straight into their final type and place.

    Args:
        execution: of `eval.group.group_execution` where several processes share the work; each loads the weights.
    """
    place = pick_device(device)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = CausalLM(source.config, source.rope, backend, execution)
    model = model.to(dtype).to_empty(device=place)
    weights = read_hf(source.path).weights if source.kind == "hf" else read_weights(source.path)
    load_weights(model, weights, str(source.path))
    model, tokenizer = model.eval().requires_grad_(False), load_tokenizer(source.tokenizer)
    if execution.parallel is None:
        return Loaded(model, tokenizer, source)
    with torch.device("meta"):
        alone = CausalLM(source.config, source.rope, backend)
    alone.load_state_dict(model.state_dict(), assign=True)  # the same tensors, not copies
    return Loaded(alone.eval().requires_grad_(False), tokenizer, source, Group(model))


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda -> the device; `cuda` without a GPU is an error, never a silent CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU: use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compared_plans(source: Source, attention: EvalAttentionConfig) -> dict[str, tuple[LayerPlan, ...]]:
    """The plans to evaluate, by name: `full`, and `moba` if the checkpoint or the settings say how.

    Raises:
        UserError: settings that do not make a MoBA plan.
    """
    layers = source.config.num_layers
    plans = {"full": full_plans(layers)}
    if attention.kind == "full":
        return plans
    if attention.kind == "moba":
        for key in ("block_size", "topk"):
            if getattr(attention, key) < 1:
                raise UserError(f"attention.{key}={getattr(attention, key)}: attention.kind=moba needs at least 1")
        _check_block(attention.block_size)
        return {**plans, "moba": plan(replace(attention, full_after=1.0), layers, 1.0)}
    trained = source.moba
    if trained is None:
        if not attention.block_size and not attention.topk:
            return plans
        if not attention.block_size or not attention.topk:
            raise UserError(
                f"{source.path} was not trained with MoBA: set both attention.block_size and attention.topk"
            )
    settings = trained or {"layers": list(range(layers))}
    block_size, topk = attention.block_size or settings["block_size"], attention.topk or settings["topk"]
    choose = attention.choose if attention.choose != "moba" else settings.get("choose", "moba")
    _check_block(block_size)
    check_chooser("attention.choose", choose, topk)
    moba = LayerPlan("moba", block_size, topk, choose)
    return {**plans, "moba": tuple(moba if layer in settings["layers"] else FULL for layer in range(layers))}


def _check_block(block_size: int) -> None:
    if block_size % BLOCK_MULTIPLE:
        raise UserError(f"attention.block_size={block_size} is not a multiple of {BLOCK_MULTIPLE}")


def _hf_source(path: Path) -> Source:
    opened = read_hf(path)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.glob("*.safetensors"))
    digest = hashlib.sha256(json.dumps([raw, files], sort_keys=True).encode()).hexdigest()
    return Source(
        kind="hf",
        path=path,
        name=f"{path.resolve().parent.name}/{path.resolve().name}",
        config=opened.config,
        rope=opened.rope,
        seq_len=int(raw["max_position_embeddings"]),
        moba=checked_moba(raw.get("moba"), opened.config.num_layers, path),
        data=(),
        tokenizer=path,
        run=None,
        fingerprint=digest,
    )


def _sets(config: TrainConfig, stage: str) -> tuple[tuple[str, Path], ...]:
    data = config.stages[stage].data
    heaviest = sorted(data.domains, key=lambda domain: -data.domains[domain])
    names = dict.fromkeys(set_of(data, domain) for domain in heaviest)
    return tuple((name, Path(config.data.sets[name].path)) for name in names if name in config.data.sets)
