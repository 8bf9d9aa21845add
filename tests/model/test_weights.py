from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conf.checksums import sha256_file
from conf.errors import UserError
from conf.schema import RopeConfig
from model.transformer import CausalLM
from model.weights import (
    TensorFiles,
    find_checkpoint,
    list_checkpoints,
    load_weights,
    read_weights,
    verify_checkpoint,
)
from tests.model.build import tiny_config, tiny_model


def write_checkpoint(folder: Path, model: CausalLM, files: int = 2) -> Path:
    """A checkpoint as the trainer writes it, as far as this package reads it."""
    folder.mkdir(parents=True)
    named = list(model.named_parameters())
    for index in range(files):
        part = {name: p.detach().float().contiguous() for name, p in named[index::files]}
        save_file(part, folder / f"weights-{index:05d}.safetensors")
    entries = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": entries}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 10, 9):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", tiny_model(seed=step))
    (tmp_path / "run" / "checkpoints" / "step-00000011").mkdir()  # unfinished: no manifest
    (tmp_path / "run" / "checkpoints" / ".tmp-step-00000012").mkdir()
    return tmp_path / "run"


def test_newest_is_found_from_everywhere(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000010"
    assert [find_checkpoint(p) for p in (run, run / "checkpoints", newest)] == [newest] * 3
    assert [p.name for p in list_checkpoints(run)] == ["step-00000002", "step-00000009", "step-00000010"]
    assert find_checkpoint(run / "checkpoints" / "step-00000002").name == "step-00000002"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"),
    [(truncate, "bytes"), (flip, "SHA-256"), (Path.unlink, "missing")],
    ids=lambda x: str(x)[:20],
)
def test_damaged_checkpoints(run: Path, damage: Callable[[Path], None], word: str) -> None:
    """One that is named is refused; in a run folder the one before it is taken."""
    newest = run / "checkpoints" / "step-00000010"
    damage(newest / "weights-00001.safetensors")
    with pytest.raises(UserError, match=word):
        find_checkpoint(newest)
    assert find_checkpoint(run).name == "step-00000009"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"a": 3}}', '{"files": []}'])
def test_damaged_manifest(run: Path, content: str) -> None:
    (run / "checkpoints" / "step-00000010" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest"):
        verify_checkpoint(run / "checkpoints" / "step-00000010")


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no finished checkpoint"):
        find_checkpoint(tmp_path)
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(UserError, match="not a finished checkpoint"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tiny_config(tie_embeddings=tied))
    folder = write_checkpoint(tmp_path / "step-00000001", model, files=3)
    back = CausalLM(model.config, RopeConfig())
    load_weights(back, read_weights(folder), str(folder))
    for (name, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step-00000001", tiny_model())
    for changes, word in [
        ({"num_layers": 3}, "missing, such as model.layers.2"),
        ({"num_layers": 1}, "no place, such as model.layers.1"),
        ({"intermediate_size": 64}, r"mlp.\w+_proj.weight has shape"),
    ]:
        model = CausalLM(tiny_config(**changes), RopeConfig())
        with pytest.raises(UserError, match=word):
            load_weights(model, read_weights(folder), "here")
    with pytest.raises(UserError, match=r"weights-\*"):
        read_weights(tmp_path)


def test_tensor_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    files = TensorFiles([tmp_path / "one.safetensors"])
    assert files.shapes == {"a": (2,), "b": (3,)}
    assert [name for name, _ in files] == ["a", "b"]
    with pytest.raises(UserError, match="a is in"):
        TensorFiles([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    truncate(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"one.safetensors is truncated"):
        TensorFiles([tmp_path / "one.safetensors"])
    with pytest.raises(UserError, match="missing"):
        TensorFiles([tmp_path / "three.safetensors"])
