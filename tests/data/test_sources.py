import json
from pathlib import Path

import pytest

from conf.errors import UserError
from data.sources import Document, hash_order, list_files, read_documents


def read(source: Path) -> tuple[list[Document], list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    documents = list(read_documents(list_files(str(source)), lambda place, reason: bad.append((place, reason))))
    return documents, bad


def test_stdlib_is_sorted_long_and_without_packages() -> None:
    files = list_files("stdlib")
    names = [file.name for file in files]
    assert names == sorted(names) and {"json/decoder.py", "os.py"} <= set(names)
    assert not any("site-packages" in name or "dist-packages" in name for name in names)
    assert sum(file.path.stat().st_size for file in files) > 5_000_000


def test_a_folder_of_many_kinds(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "x.md").write_bytes(b"line\r\nline\r\n")
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "c.py").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "photo.png").write_bytes(b"1")
    (tmp_path / ".git" / "hidden.txt").write_text("no")
    documents, bad = read(tmp_path)
    assert documents == [Document("a.txt", "hello"), Document("b/x.md", "line\r\nline\r\n")]
    assert bad == [("c.py", "not valid UTF-8"), ("d.txt", "empty")]


def test_jsonl_counts_bad_records_with_their_line(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "one"}).encode(),
        b"{broken",
        b'{"body": "x"}',
        b'{"text": 5}',
        b"",
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        json.dumps({"text": "é\u2028two"}).encode(),
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    documents, bad = read(tmp_path / "x.jsonl")
    assert [(d.name, d.text) for d in documents] == [("x.jsonl:1", "one"), ("x.jsonl:9", "é\u2028two")]
    assert [place for place, _ in bad] == [f"x.jsonl:{n}" for n in (2, 3, 4, 6, 7, 8)]
    assert {reason for _, reason in bad} == {
        "not valid JSON",
        "field `text` is missing or no string",
        "not valid UTF-8",
    }


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "x.parquet")
    documents, bad = read(tmp_path)
    assert documents == [Document("x.parquet:1", "one"), Document("x.parquet:3", "two")]
    assert bad == [("x.parquet:2", "field `text` is missing or no string")]
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"x\.parquet: not a readable parquet file"):
        read(tmp_path)


def test_hash_order_is_stable_and_complete() -> None:
    files = list_files("stdlib")[:200]
    mixed = hash_order(reversed(files))
    assert mixed == hash_order(files) != files
    assert sorted(mixed, key=lambda f: f.name) == files


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        list_files(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no"):
        list_files(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="unknown kind of file"):
        list_files(str(tmp_path / "x.bin"))
