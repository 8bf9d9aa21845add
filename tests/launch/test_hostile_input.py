"""Input nobody meant: random overrides, YAML and files end in one line and code 2, never in a traceback."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conf.docs import walk
from conf.errors import UserError
from conf.load import load_train_config
from conf.schema import ROOTS
from eval.load import load_model
from launch.cli import main

KEYS = [doc.key for doc in walk(ROOTS["train"])]
VALUES = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=True).map(str),
    st.sampled_from(
        ["", "null", "[]", "{}", "[1,2", "{a: ", "${oc.env:HOME}", "${x", "true", "'", "../..", "!!python/x"]
    ),
    st.text(max_size=12),
)
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(["", "+", "~", "++"]), st.sampled_from(KEYS), VALUES).map(
        lambda p: f"{p[0]}{p[1]}={p[2]}"
    ),
    st.text(max_size=20).filter(lambda text: text not in ("-h", "--help", "--cfg")),
)


def told(arguments: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, err.getvalue()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
@example(["model.num_layers=1e400"])
@example(["stages.short.data.domains={text: nan}"])
@example(["out=a\x00b"])
@example(["launch.slurm.extra=['--x\n#SBATCH --y']", "launch.kind=slurm"])
def test_overrides(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["train", "recipe=smoke", f"out={folder}/run", "data.sets.text.source=x", "dry_run=true"]
        code, said = told([*fixed, *overrides, "dry_run=true"])
        assert code in (0, 2), (overrides, said)
        if code:
            assert said.startswith("error: ") and said.count("\n") == 1, said
        assert not list(Path(folder).rglob("*.safetensors"))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
@example("stages: [1, 2]\n")
@example("out: !!python/object/apply:os.system ['true']\n")
@example("a: &a [*a]\n")
@example("{")
@example(b"\xff\xfe\x00")
def test_run_folders_yaml(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        code, said = told(["train", f"out={folder}", "dry_run=true"])
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path(tempfile.gettempdir()) / "longmoba-bomb",))


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "pytorch_model.bin", "state.json", "manifest.json"])
def test_a_pickle_is_never_run(tmp_path: Path, name: str) -> None:
    mark = Path(tempfile.gettempdir()) / "longmoba-bomb"
    mark.unlink(missing_ok=True)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    data = pickle.dumps(Bomb())
    (checkpoint / name).write_bytes(data)
    if name != "manifest.json":
        files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        (checkpoint / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
    with pytest.raises(UserError):
        load_model(tmp_path, "cpu")
    assert not mark.exists()


def test_config_of_another_shape(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(UserError):
        load_train_config(tmp_path / "config.yaml")
