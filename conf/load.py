"""Reading and writing resolved configurations as YAML, through the typed schema."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import UserError
from conf.schema import TrainConfig

T = TypeVar("T")


def to_typed(raw: object, schema: type[T], where: str) -> T:
    """Merge `raw` (a mapping or an OmegaConf node) over `schema`; unknown keys and wrong types are errors."""
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), raw)))
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{where}: {first} (key {getattr(error, 'full_key', None) or '?'})") from error


def load_train_config(path: Path) -> TrainConfig:
    """The resolved configuration of a run, from its `config.yaml`."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: is this a run folder or a checkpoint made by `moba train`?")
    try:
        raw = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is damaged or no plain YAML: {first}") from error
    return to_typed(raw, TrainConfig, str(path))


def save_config(config: object, path: Path, comment: str = "") -> None:
    """Write a typed configuration as readable YAML: whole or not at all. `comment` stands above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    temporary.write_text(head + OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
    temporary.replace(path)
