"""What a run starts from: `init.hf` or `init.checkpoint` fills in the model section, RoPE and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.errors import UserError
from conf.inherit import reach, stage_ropes
from conf.load import load_train_config
from conf.paths import CheckpointPaths
from conf.schema import InitConfig, ModelConfig, RopeConfig, StageRopeConfig, TrainConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Origin:
    """What is known of the folder a run starts from, before any tensor is read.

    Attributes:
        key: the setting that named it, as `init.hf=DIR`, for messages.
        rope: RoPE of its weights.
        seq_len: tokens they read with it.
        tokenizer: folder, empty if it has none.
    """

    key: str
    model: ModelConfig
    rope: RopeConfig
    seq_len: int
    tokenizer: str


def find_origin(init: InitConfig) -> Origin | None:
    """Look at the folder that `init` names; None if it names none.

    Raises:
        UserError: both are given, or the folder is not what it should be.
    """
    if init.hf and init.checkpoint:
        raise UserError(f"init.hf={init.hf} and init.checkpoint={init.checkpoint}: give one of them")
    if init.hf:
        from model.hf_config import read_config_json

        folder = Path(init.hf)
        parsed = read_config_json(folder)
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
        tokenizer = init.hf if has_tokenizer else ""
        return Origin(f"init.hf={init.hf}", parsed.model, parsed.rope, parsed.seq_len, tokenizer)
    if init.checkpoint:
        return _checkpoint_origin(init.checkpoint)
    return None


def _checkpoint_origin(name: str) -> Origin:
    from model.weights import newest_checkpoint

    paths = CheckpointPaths(newest_checkpoint(Path(name)))
    config = load_train_config(paths.config)
    stage = json.loads(paths.state.read_text(encoding="utf-8"))["stage"]
    if stage not in config.stages:
        raise UserError(f"{paths.root}: stage {stage} of state.json is not in config.yaml")
    tokenizer = str(paths.tokenizer) if paths.tokenizer.is_dir() else ""
    rope = stage_ropes(config.stages)[stage]
    return Origin(f"init.checkpoint={name}", config.model, rope, reach(config, stage), tokenizer)


class Completion:
    """Fills a composed training configuration from its `init` folder; see `conf.compose.compose_train`.

    Args:
        asked: key -> value of the overrides on the command line: what is written there is never filled in.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._asked = asked
        self.origin: Origin | None = None

    def __call__(self, config: DictConfig) -> None:
        """In place. Raises UserError where `model.*` contradicts the folder."""
        self.origin = origin = find_origin(InitConfig(config.init.hf, config.init.checkpoint))
        if origin is None:
            return
        for field in fields(ModelConfig):
            self._fill(config.model, field.name, None if field.default is MISSING else field.default, origin)
        if not config.data.tokenizer.path:
            config.data.tokenizer.path = origin.tokenizer

    def _fill(self, model: DictConfig, name: str, default: Any, origin: Origin) -> None:
        theirs = getattr(origin.model, name)
        if not OmegaConf.is_missing(model, name):
            ours = model[name]
            if name == "init_std" or (name == "key_conv" and not theirs):
                return  # no part of their weights: what is added starts as nothing
            left_out = ours == default and f"model.{name}" not in self._asked
            if ours != theirs and not left_out and not (name == "head_dim" and ours == 0):
                raise UserError(
                    f"model.{name}={ours} contradicts {origin.key}, which has {theirs}: leave model.* out"
                )
        model[name] = theirs


def complete_ropes(config: TrainConfig, origin: Origin | None) -> TrainConfig:
    """Give every stage its complete RoPE, in place, so that `config.yaml` says it in full."""
    ropes = stage_ropes(config.stages, origin.rope if origin else None)
    for name, rope in ropes.items():
        config.stages[name].rope = StageRopeConfig(**asdict(rope))
    if origin is not None and origin.rope in list(ropes.values())[:1]:
        config.init.seq_len = origin.seq_len
    return config


def check_origin(config: TrainConfig) -> None:
    """What a fresh run needs of its `init` folder beyond the configuration: whole tensors, a fitting tokenizer.

    Raises:
        UserError: tensors that are missing, misshapen or truncated; a tokenizer that is missing, larger than
            the model's vocabulary, or not the one of `data.tokenizer.path`.
    """
    origin = find_origin(config.init)
    if origin is None:
        return
    if config.init.hf:
        from model.hf import read_hf

        read_hf(Path(config.init.hf))
    from data.tokenizer import load_tokenizer

    path = config.data.tokenizer.path
    if not path:
        raise UserError(f"{origin.key} has no tokenizer: give data.tokenizer.path=FOLDER")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, the model of {origin.key} only "
            f"{config.model.vocab_size}: use the tokenizer it was trained with"
        )
    if origin.tokenizer and origin.tokenizer != path:
        _same(tokenizer.fingerprint, f"data.tokenizer.path={path}", origin)


def check_sets(config: TrainConfig) -> None:
    """Refuse a prepared set that was made with another tokenizer than the weights were."""
    origin = find_origin(config.init)
    if origin is None:
        return
    from data.manifest import load_manifest

    for name, one in config.data.sets.items():
        path = origin.tokenizer or config.data.tokenizer.path
        where = f"data.sets.{name}.path={one.path}"
        _same(load_manifest(Path(one.path)).tokenizer_fingerprint, where, origin, path)


def _same(fingerprint: str, where: str, origin: Origin, path: str = "") -> None:
    from data.tokenizer import load_tokenizer

    path = path or origin.tokenizer
    if load_tokenizer(path).fingerprint != fingerprint:
        raise UserError(
            f"{where} has another tokenizer than {origin.key}: its token ids mean other text to the model; "
            f"prepare the text with tokenizer.path={path}"
        )
