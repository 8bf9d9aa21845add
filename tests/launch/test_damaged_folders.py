"""Folders from a bad copy, or from somebody with bad intentions: one line, code 2, nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data.manifest import load_manifest
from data.store import TokenStore
from launch.cli import main
from launch.import_hf import import_hf
from tests.launch.folders import save_llama, save_texts, save_tokenizer

# Random, but the same in every run; what fails is said as it is: making it smaller would take minutes.
FUZZ = settings(
    max_examples=int(os.environ.get("LONGMOBA_FUZZ", "25")),
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
MARK = Path(tempfile.gettempdir()) / f"longmoba-mark-{os.getpid()}"


def told(arguments: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, err.getvalue()


def one_line(said: str) -> bool:
    """Also free of control characters, which a name could bring to the terminal."""
    return said.startswith("error: ") and said.endswith("\n") and said[:-1].isprintable()


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (MARK,))


# What happens to a file: its bytes, two numbers in [0, 1) -> its new bytes; None deletes it.
HARMS: dict[str, Callable[[bytes, float, float], bytes | None]] = {
    "cut short": lambda data, a, b: data[: int(a * len(data))],
    "one byte changed": lambda data, a, b: _changed(data, int(a * len(data)), int(b * 256)),
    "noise": lambda data, a, b: bytes(int(x * 997 * (a + 1)) % 256 for x in range(int(b * 300))),
    "gone": lambda data, a, b: None,
    "a pickle": lambda data, a, b: pickle.dumps(Bomb()),
    "another JSON": lambda data, a, b: [b"[]", b"{}", b"null", b"3", b'{"a": [1e999]}', b"[" * 99_999][int(a * 6)],
    "a value changed": lambda data, a, b: _other_value(data, a, b),
}
OTHERS: list[Any] = [None, -1, 0, 3, 10**30, 1e-320, "x", "", [], {}, True, "../../etc/passwd", "a\nb", [[]]]


def _changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def _other_value(data: bytes, a: float, b: float) -> bytes:
    """One value of a JSON file's top level replaced; other files stay."""
    try:
        content = json.loads(data)
        key = list(content)[int(a * len(content))]
        content[key] = OTHERS[int(b * len(OTHERS))]
    except (ValueError, LookupError, TypeError):
        return data
    return json.dumps(content).encode()


def harm(folder: Path, file: float, how: str, a: float, b: float) -> str:
    """Damage one of the folder's files, all of which take turns; its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[int(file * len(files))]
    data = HARMS[how](path.read_bytes(), a, b)
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    return path.name


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several weights files with an index, and a tokenizer."""
    folder = save_llama(tmp_path_factory.mktemp("hf") / "hf", max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="module")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_hf(hf, tmp_path_factory.mktemp("checkpoint") / "c")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    save_texts(folder / "texts")
    save_tokenizer(folder / "words")
    code, said = told(["prepare", f"source={folder / 'texts'}", f"out={folder / 'set'}",
                       f"tokenizer.path={folder / 'words'}"])  # fmt: skip
    assert code == 0, said
    return folder / "set"


@contextlib.contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    """A copy, and beside it room for output."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(folder, Path(place) / "in")
        yield Path(place) / "in"


def check(command: list[str], out: Path, what: object) -> None:
    """`command` works, or says one line with code 2 and leaves nothing of `out`; no pickle is run."""
    MARK.unlink(missing_ok=True)
    code, said = told(command)
    assert code in (0, 2), (what, said)
    if code:
        assert one_line(said), (what, said)
        assert [path.name for path in out.parent.iterdir()] == ["in"], what
    assert not MARK.exists(), what


UNIT = st.floats(0, 1, exclude_max=True)
DEEP, ENDLESS = 0.99, 0.7  # positions of the two nastiest in HARMS["another JSON"]


@FUZZ
@given(UNIT, st.sampled_from(sorted(HARMS)), UNIT, UNIT)
def test_hugging_face_folders(hf: Path, file: float, how: str, a: float, b: float) -> None:
    with copy_of(hf) as folder:
        name = harm(folder, file, how, a, b)
        check(["import", f"hf={folder}", f"out={folder.parent / 'out'}"], folder.parent / "out", (name, how, a, b))


@FUZZ
@given(UNIT, st.sampled_from(sorted(HARMS)), UNIT, UNIT)
def test_checkpoints(checkpoint: Path, file: float, how: str, a: float, b: float) -> None:
    """Every byte of them is under a checksum: nothing that was changed is ever taken."""
    with copy_of(checkpoint) as folder:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        name = harm(folder, file, how, a, b)
        same = all(path.is_file() and path.read_bytes() == data for path, data in before.items())
        out = folder.parent / "out"
        check(["export", f"checkpoint={folder}", f"out={out}"], out, (name, how, a, b))
        assert same or name == "manifest.json" or not out.exists(), (name, how, a, b)


@FUZZ
@given(UNIT, st.sampled_from(sorted(HARMS)), UNIT, UNIT)
def test_prepared_sets(prepared: Path, file: float, how: str, a: float, b: float) -> None:
    with copy_of(prepared) as folder:
        what = harm(folder, file, how, a, b), how, a, b
        try:
            load_manifest(folder)
            for split in ("train", "heldout"):
                store = TokenStore(folder, split)
                store.verify()
                for index in range(len(store)):
                    store.doc(index), store.loss(index)
        except UserError as error:
            assert "\n" not in str(error), what


NAMES = [
    "a b",
    "it's",
    'say "x"',
    "$(touch mark)",
    "-rf",
    "x;y",
    "a\nb",
    "ünï",
    "{a: 1}",
    "a=b",
    "\x1b[31mred",
    "%s",
]


@pytest.mark.parametrize("value", [DEEP, ENDLESS])
@pytest.mark.parametrize("number", range(12))
def test_json_that_is_none(hf: Path, checkpoint: Path, number: int, value: float) -> None:
    """In every file of both kinds of folder, one after the other."""
    for source, command in ((hf, ["import", "hf="]), (checkpoint, ["export", "checkpoint="])):
        with copy_of(source) as folder:
            files = len([path for path in folder.rglob("*") if path.is_file()])
            if number >= files:
                continue
            name = harm(folder, (number + 0.5) / files, "another JSON", value, 0.0)
            out = folder.parent / "out"
            check([command[0], f"{command[1]}{folder}", f"out={out}"], out, (name, value))


@pytest.mark.parametrize("name", [*NAMES, "${oc.env:HOME}", "a,b", "[1]"])
def test_hostile_names(hf: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of any name is used as it is called, or refused in one line; nothing in a name is ever run."""
    source = tmp_path / name
    shutil.copytree(hf, source)
    monkeypatch.chdir(tmp_path)
    quoted = str(source).replace("\\", "\\\\").replace('"', '\\"')
    for argument in (f"hf={source}", f'hf="{quoted}"'):
        code, said = told(["import", argument, f"out={tmp_path / 'out'}"])
        assert code in (0, 2) and (code == 0 or one_line(said)), (argument, said)
    assert sorted(path.name for path in tmp_path.iterdir()) in ([name], sorted([name, "out"]))
