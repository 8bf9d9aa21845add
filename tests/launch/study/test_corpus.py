from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from conf.errors import UserError
from launch.study.corpus import build_corpus
from tests.launch.study.texts import make_packages, module

EVERYTHING = 10**9


def test_near_duplicates_tables_and_scraps_are_left_out(tmp_path: Path) -> None:
    root = make_packages(tmp_path / "in", 2, files=2)
    original = (root / "package00" / "module0.py").read_text()
    lines = original.splitlines(keepends=True)
    (root / "package00" / "copy.py").write_text(original)
    (root / "package01" / "edited.py").write_text(
        "# edited\n" + "".join(lines[: len(lines) // 2]) + module(random.Random(9), 4)
    )
    (root / "package01" / "table.py").write_text("\n".join(f"x{i} = {i * 7919}" for i in range(500)))
    (root / "package01" / "scrap.py").write_text("pass\n")
    about = build_corpus(tmp_path / "text", [root], EVERYTHING)
    assert about["left_out"] == {"near-duplicate": 2, "table or generated": 1, "too short or too long": 1}
    assert about["files"] == 4
    assert json.loads((tmp_path / "text-about.json").read_text()) == about


def test_every_file_is_in_one_document_of_neighbours(tmp_path: Path) -> None:
    root = make_packages(tmp_path / "in", 3, files=9)
    size = len((root / "package00" / "module0.py").read_text())
    about = build_corpus(tmp_path / "text", [root], EVERYTHING, (5 * size, 2 * size))
    folders = sorted(path for path in (tmp_path / "text").iterdir())
    assert len(folders) == about["documents"] > 3
    files = [(path.name, path.parent.name[:-3]) for path in (tmp_path / "text").rglob("*.txt")]
    assert len(files) == len(set(files)) == 27
    longest = max(folders, key=lambda folder: sum(f.stat().st_size for f in folder.iterdir()))
    assert sum(f.stat().st_size for f in longest.iterdir()) >= 5 * size


def test_size_is_limited_and_the_order_does_not_change(tmp_path: Path) -> None:
    root = make_packages(tmp_path / "in", 4)
    first = build_corpus(tmp_path / "a", [root], 20_000)
    build_corpus(tmp_path / "b", [root], 20_000)
    assert isinstance(first["chars"], int) and 20_000 <= first["chars"] < 40_000
    names = [{p.relative_to(tmp_path / x).as_posix() for p in (tmp_path / x).rglob("*.txt")} for x in "ab"]
    assert names[0] == names[1]


def test_nothing_to_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable text below"):
        build_corpus(tmp_path / "text", [tmp_path], EVERYTHING)
