import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.schema import ReadConfig, SyntheticConfig
from data.readers import Document, read_unit
from data.sources import cut, hash_order, list_files

FIELDS = ReadConfig()


def read(
    source: Path | str, config: ReadConfig = FIELDS, unit_bytes: int = 1 << 20
) -> tuple[list[Document], list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    units = cut(list_files(str(source), config), unit_bytes, config, SyntheticConfig())
    found = [d for u in units for d in read_unit(u, config, lambda place, reason: bad.append((place, reason)))]
    return found, bad


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
    units = cut(list_files("stdlib")[:200], 1, FIELDS, SyntheticConfig())
    mixed = hash_order(reversed(units))
    assert mixed == hash_order(units) != units
    assert sorted(mixed, key=lambda u: u.name) == units


LINES = st.lists(st.text("ab\u2028", max_size=30).map(lambda s: s.replace("\n", "")), max_size=40)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=LINES, size=st.integers(1, 200), last=st.booleans(), packed=st.sampled_from(("", ".gz", ".zst")))
def test_a_cut_file_reads_as_a_whole_one(
    tmp_path: Path, texts: list[str], size: int, last: bool, packed: str
) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) if text else "" for text in texts]
    path = tmp_path / f"x.jsonl{packed}"
    text = ("\n".join(lines) + ("\n" if last else "")).encode()
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed](text))
    assert read(path, unit_bytes=size) == read(path)
    units = cut(list_files(str(path)), size, FIELDS, SyntheticConfig())
    if not packed or len(units) > 1:
        assert sum(unit.bytes for unit in units) == len(text)


def test_compressed_lines_are_the_same_documents(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {i} " + "x" * i}) + "\n" for i in range(3000)).encode()
    plain, gz, zst = (tmp_path / f"{n}.jsonl{end}" for n, end in (("a", ""), ("b", ".gz"), ("c", ".zst")))
    plain.write_bytes(lines)
    gz.write_bytes(gzip.compress(lines))
    zst.write_bytes(zstandard.compress(lines[:5000]) + zstandard.compress(lines[5000:]))  # two frames
    texts = [[d.text for d in read(path)[0]] for path in (plain, gz, zst)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 3000
    for path in (gz, zst):  # entered in the middle, for several processes and for what a kill leaves to do
        assert len(cut(list_files(str(path)), 1 << 12, FIELDS, SyntheticConfig())) > 3
        assert [d.text for d in read(path, unit_bytes=1 << 12)[0]] == texts[0]
    for path in (gz, zst):
        path.write_bytes(path.read_bytes()[:-20])
        for size in (1 << 12, 1 << 20):  # found while cutting, or while reading
            with pytest.raises(UserError, match=f"{path.name}: damaged archive"):
                read(path, unit_bytes=size)


def test_a_repository_is_one_document(tmp_path: Path) -> None:
    for repo in ("b", "a"):
        (tmp_path / repo / "src").mkdir(parents=True)
        (tmp_path / repo / ".git").mkdir()
        (tmp_path / repo / ".git" / "config").write_text("no")
        (tmp_path / repo / "src" / "x.rs").write_text(f"fn {repo}() {{}}")
        (tmp_path / repo / "Makefile").write_text("all:\n")
        (tmp_path / repo / "logo.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "b" / "latin").write_bytes(b"\xe9")
    documents, bad = read(tmp_path, ReadConfig(repos=1))
    assert [d.name for d in documents] == ["a", "b"] and bad == [("b/latin", "not valid UTF-8")]
    assert documents[0].text == "Makefile:\nall:\n\nsrc/x.rs:\nfn a() {}\n"
    with pytest.raises(UserError, match=r"read\.repos=4"):
        read(tmp_path, ReadConfig(repos=4))


def test_arrow_and_a_saved_data_set(tmp_path: Path) -> None:
    import datasets
    import pyarrow

    datasets.Dataset.from_dict({"text": ["one", "two"], "other": [1, 2]}).save_to_disk(tmp_path / "saved")
    table = pyarrow.table({"text": ["three"]})
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as out:
        out.write_table(table)
    documents, bad = read(tmp_path)
    assert sorted(d.text for d in documents) == ["one", "three", "two"] and not bad
    (tmp_path / "file.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"file\.arrow: not a readable arrow file"):
        read(tmp_path)


def test_row_groups_are_read_apart_and_the_column_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": [f"row {i}" for i in range(100)], "text": ["no"] * 100})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=9)
    config = ReadConfig(field="body")
    whole, parts = read(tmp_path, config), read(tmp_path, config, unit_bytes=100)
    assert parts == whole and [d.text for d in whole[0]] == table["body"].to_pylist()
    assert len(cut(list_files(str(tmp_path)), 100, config, SyntheticConfig())) > 3
    with pytest.raises(UserError, match=r"no column nothing; set read\.field to one of body, text"):
        read(tmp_path, ReadConfig(field="nothing"))


def test_a_hub_data_set_is_streamed_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for part in ("a", "b"):
        (folder / f"train-{part}.jsonl").write_text("".join(f'{{"text": "{part}{i}"}}\n' for i in range(3)))
    units = cut(list_files(f"hub:{folder}"), 1, FIELDS, SyntheticConfig())
    assert len(units) == 2
    documents, bad = read(f"hub:{folder}")
    assert sorted(d.text for d in documents) == ["a0", "a1", "a2", "b0", "b1", "b2"] and not bad
    assert len({d.name for d in documents}) == 6
    with pytest.raises(UserError, match="hub:"):
        read(f"hub:{folder}", ReadConfig(split="nowhere"))


def test_absurd_length_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 11)
    (tmp_path / "b.txt").write_text("x" * 50)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "x" * 11}) + "\n" + json.dumps({"text": "x" * 10}))
    documents, bad = read(tmp_path, ReadConfig(max_chars=10))
    assert [d.name for d in documents] == ["c.jsonl:2"]
    assert [place for place, _ in bad] == ["a.txt", "b.txt", "c.jsonl:1"]
    assert {reason for _, reason in bad} == {"longer than read.max_chars"}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        list_files(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no"):
        list_files(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="unknown kind of file"):
        list_files(str(tmp_path / "x.bin"))
