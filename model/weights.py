"""Finding, verifying and reading weights on disk: training checkpoints and safetensors folders alike.

Everything is read tensor by tensor; nothing here holds more than one tensor at a time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from conf.checksums import check_hashes
from conf.errors import UserError
from conf.paths import CheckpointPaths, RunPaths

_log = logging.getLogger(__name__)


def list_checkpoints(path: Path) -> list[Path]:
    """Checkpoints of a run folder or of its `checkpoints` folder, oldest first. Unfinished ones are left out."""
    folder = RunPaths(path).checkpoints
    found = (folder if folder.is_dir() else path).glob("step-*")
    return sorted(item for item in found if CheckpointPaths(item).manifest.is_file())


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint under `path` whose files are whole.

    Args:
        path: a run folder, its `checkpoints` folder, or one checkpoint.

    Raises:
        UserError: there is none, or the one that was named is damaged. In a run folder a damaged one is
            skipped with a warning.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: name a run folder or one of its checkpoints")
    if CheckpointPaths(path).manifest.is_file():
        verify_checkpoint(path)
        return path
    checkpoints = list_checkpoints(path)
    for checkpoint in reversed(checkpoints):
        try:
            verify_checkpoint(checkpoint)
        except UserError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
        else:
            return checkpoint
    state = "all of its checkpoints are damaged" if checkpoints else "it holds no finished checkpoint"
    raise UserError(f"{path}: {state}: name a run folder or a checkpoint made by `moba train`")


def newest_checkpoint(path: Path) -> Path:
    """As `find_checkpoint`, by name alone: nothing is verified. For a look at its configuration."""
    if CheckpointPaths(path).manifest.is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path} holds no finished checkpoint: name a run folder or one of its checkpoints")
    return checkpoints[-1]


def verify_checkpoint(path: Path, share: slice = slice(None)) -> None:
    """Compare every file with the manifest, by size and SHA-256.

    `share`: of the checksums, large files first, for callers that divide the work; sizes are all compared.

    Raises:
        UserError: no manifest, an unreadable one, or a file that is missing or differs; named.
    """
    manifest = CheckpointPaths(path).manifest
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is not a finished checkpoint: it has no {manifest.name}") from None
    except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest} is damaged ({error!r}): use another checkpoint") from error
    check_hashes(path, expected, "use another checkpoint", share)


class TensorFiles:
    """The tensors of one or more safetensors files, read one at a time, by name or in order.

    Raises:
        UserError: a file is missing, truncated or not safetensors, or two files hold one name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._file: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _open(path) as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    if name in self._file:
                        raise UserError(f"{name} is in {self._file[name]} and in {path}: remove one")
                    self._file[name] = path
                    self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with _open(self._file[name]) as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._file:
            yield name, self[name]

    def __len__(self) -> int:
        return len(self._file)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the folder again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not safetensors ({error}): copy it again") from error


def checkpoint_tensors(path: Path) -> TensorFiles:
    """The model weights of one checkpoint: fp32 master weights, full tensors, our names."""
    files = sorted(path.glob("weights-*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no weights-*.safetensors: name a checkpoint made by `moba train`")
    return TensorFiles(files)


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of one checkpoint, tensor by tensor."""
    return iter(checkpoint_tensors(path))


def check_names(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Refuse missing tensors, extra tensors and wrong shapes, naming the first of them."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors are missing, such as {missing[0]}: check the config")
    if extra:
        raise UserError(f"{where}: {len(extra)} tensors have no place, such as {extra[0]}: check the config")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{where}: {name} has shape {list(found[name])}, the config says {list(shape)}")


@torch.no_grad()
def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy tensors into the model's parameters, casting to their dtype and device. A tied head comes once.

    Raises:
        UserError: missing, extra or misshapen tensors.
    """
    parameters = dict(model.named_parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in weights:
        shapes[name] = tuple(tensor.shape)
        if name in parameters and parameters[name].shape == tensor.shape:
            parameters[name].copy_(tensor)
    check_names(shapes, {name: tuple(p.shape) for name, p in parameters.items()}, where)
