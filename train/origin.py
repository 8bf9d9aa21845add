"""Where the weights of a stage come from: the run's checkpoint, the folder of `init`, or the seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ModelConfig, TrainConfig
from model.hf import read_hf
from model.shapes import KEY_CONV, parameter_shapes
from model.transformer import drawn_weights
from model.weights import checkpoint_tensors, find_checkpoint
from train.mesh import Mesh

Weights = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Origin:
    """A stream of whole tensors by name that can be read more than once, one tensor in memory at a time."""

    name: str  # for messages and the log
    weights: Weights


def open_origin(config: TrainConfig, checkpoint: Path | None, mesh: Mesh) -> Origin:
    """The weights a stage starts with. Collective; nothing is read but headers and, by rank 0, checksums.

    Raises:
        UserError: the folder of `init` is not there, damaged, or has another shape.
    """
    if checkpoint is not None:
        return Origin(str(checkpoint), checkpoint_tensors(checkpoint))
    if config.init.hf:
        found = read_hf(Path(config.init.hf))
        return Origin(f"init.hf={config.init.hf}", Extended(found.weights, config.model))
    if config.init.checkpoint:
        path = _verified(Path(config.init.checkpoint), mesh)
        return Origin(f"init.checkpoint={path}", Extended(checkpoint_tensors(path), config.model))
    return Origin(f"seed={config.seed}", Drawn(config.model, config.seed))


def _verified(path: Path, mesh: Mesh) -> Path:
    """Rank 0 finds and checks; all go on with the same folder or all raise."""
    found, problem = "", ""
    if mesh.is_main:
        try:
            found = str(find_checkpoint(path))
        except UserError as error:
            problem = str(error)
    found, problem = mesh.broadcast((found, problem))
    if problem:
        raise UserError(problem)
    return Path(found)


class Extended:
    """`weights`, and zeros for the key convolution where they have none: it starts as the identity."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self._weights, self._config = weights, config

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[str] = set()
        for name, tensor in self._weights:
            seen.add(name)
            yield name, tensor
        for name, shape in parameter_shapes(self._config).items():
            if name.endswith(KEY_CONV) and name not in seen:
                yield name, torch.zeros(shape)


class Drawn:
    """Fresh weights."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return drawn_weights(self._config, self._seed)
