"""Where documents come from: which files, and in which units they are read.

A source is `stdlib`, a folder, a file, `hub:NAME` (a data set of the Hugging Face hub, streamed, or a folder that
`datasets.load_dataset` takes) or `synthetic`. It is listed cheaply (names, sizes, times) and cut into units,
which are read independently of each other (`data.readers`). Neither changes the name of a document.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from conf.errors import UserError
from conf.schema import ReadConfig, SyntheticConfig
from data.cutting import cut_jsonl, cut_parquet

STDLIB, SYNTHETIC, HUB = "stdlib", "synthetic", "hub:"
WHOLE_FILES = (".txt", ".md", ".py")
JSONL_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
FEW_FILES = 32  # archives of a source with more of them are work enough for all processes as they are
RECORD_FILES = (*JSONL_FILES, ".parquet", ".arrow")


@dataclass(frozen=True)
class SourceFile:
    """A file, or what takes its place: a repository's folder, a hub data set, a synthetic task.

    `kind` is text, jsonl, parquet, arrow, repo, hub or synthetic. Sizes in bytes, 0 where unknown.
    """

    name: str
    path: Path
    kind: str
    bytes: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class Unit:
    """A stretch of a source file: `start` to `stop` in the unit of its kind (bytes of JSONL, row groups of
    parquet, the shard `start` of a hub data set, synthetic documents), whole where `stop` is 0.

    `first`: the number of its first record in the file, from 1.
    """

    file: SourceFile
    bytes: int
    start: int = 0
    stop: int = 0
    first: int = 1

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.first}" if self.first > 1 else self.file.name


def list_files(
    source: str, read: ReadConfig | None = None, synthetic: SyntheticConfig | None = None
) -> list[SourceFile]:
    """The files of `source`, sorted by relative path.

    `stdlib` is every .py file of the running Python's standard library, its `test` packages included (they
    are a third to a half of the text, and the longest documents), installed packages excluded. In a folder,
    hidden files and folders are left out. Raises UserError if there is nothing to read.
    """
    read = read or ReadConfig()
    if source == SYNTHETIC:
        return _list_synthetic(synthetic or SyntheticConfig())
    if source.startswith(HUB):
        if source == HUB:
            raise UserError(f"source {HUB} needs the name of a data set: {HUB}NAME")
        return [SourceFile(source.removeprefix(HUB), Path(source.removeprefix(HUB)), "hub")]
    root = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
    if source == STDLIB:
        skip = {"site-packages", "dist-packages", "__pycache__"}
        found = [p for p in root.rglob("*.py") if skip.isdisjoint(p.relative_to(root).parts)]
    elif read.repos:
        return _list_repositories(root, read.repos)
    elif root.is_file():
        if not _kind(root):
            raise UserError(f"source {source}: unknown kind of file; use {', '.join(WHOLE_FILES + RECORD_FILES)}")
        return [_file(root, root.parent)]
    elif root.is_dir():
        found = [p for p in root.rglob("*") if _kind(p) and p.is_file() and not hidden(p, root)]
    else:
        raise UserError(
            f"source {source}: no such file or folder; use a path, {STDLIB}, {SYNTHETIC} or {HUB}NAME for a data "
            "set of the Hugging Face hub"
        )
    if not found:
        raise UserError(f"source {source}: holds no {', '.join(WHOLE_FILES + RECORD_FILES)} file")
    return sorted((_file(p, root) for p in found), key=lambda f: f.name)


def _list_repositories(root: Path, level: int) -> list[SourceFile]:
    if not root.is_dir():
        raise UserError(f"source {root}: no such folder; read.repos={level} looks for repositories in it")
    found = [p for p in root.glob("/".join("*" * level)) if p.is_dir() and not hidden(p, root)]
    if not found:
        raise UserError(
            f"source {root}: holds no folder {level} level(s) below it, where read.repos={level} looks"
        )
    listed = []
    for folder in found:
        stats = [path.stat() for path in repository_files(folder)]
        size, newest = sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)
        listed.append(SourceFile(folder.relative_to(root).as_posix(), folder, "repo", size, newest))
    return sorted(listed, key=lambda f: f.name)


def repository_files(folder: Path) -> list[Path]:
    """The files of a repository in their order within its document: by path, hidden ones left out."""
    found = (p for p in folder.rglob("*") if not hidden(p, folder) and p.is_file() and not p.is_symlink())
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def _list_synthetic(config: SyntheticConfig) -> list[SourceFile]:
    from data.synthetic import check_synthetic

    check_synthetic(config)
    names = [f"{task}-{length}" for task in config.tasks for length in config.lengths]
    return [SourceFile(name, Path(name), "synthetic") for name in names]


def cut(files: Iterable[SourceFile], unit_bytes: int, read: ReadConfig, synthetic: SyntheticConfig) -> list[Unit]:
    """The files in units of about `unit_bytes`, as far as their format can be entered in the middle.

    JSONL files above that size are read once for this, to number their lines. To enter an archive, what precedes
    is unpacked: it is cut into few stretches, and only if it is a good part of the source.
    """
    units: list[Unit] = []
    files = list(files)
    large = sum(file.bytes for file in files) // FEW_FILES
    for file in files:
        packed = file.kind == "jsonl" and file.path.suffix != ".jsonl"
        if file.kind == "jsonl" and file.bytes > (max(unit_bytes, large) if packed else unit_bytes):
            size = (
                max(unit_bytes, file.bytes // 4) if packed else unit_bytes
            )  # text takes four times as much or more
            units += [Unit(file, b - a, a, b, first) for a, b, first in cut_jsonl(file.path, size)]
        elif file.kind == "parquet" and file.bytes > unit_bytes:
            units += [Unit(file, size, a, b, first) for a, b, first, size in cut_parquet(file.path, unit_bytes)]
        elif file.kind == "hub":
            from data.readers import hub_shards

            units += [Unit(file, 0, shard, shard + 1) for shard in range(hub_shards(file, read))]
        elif file.kind == "synthetic":
            from data.synthetic import length_of

            size = 4 * length_of(file.name)  # characters, roughly
            step = max(1, unit_bytes // size)
            for start in range(0, synthetic.documents, step):
                stop = min(start + step, synthetic.documents)
                units.append(Unit(file, size * (stop - start), start, stop, start + 1))
        else:
            units.append(Unit(file, file.bytes))
    return units


def hash_order(units: Iterable[Unit]) -> list[Unit]:
    """The units in an order given by a hash of their names: a fair sample is any prefix of it."""
    return sorted(units, key=lambda u: hashlib.blake2b(u.name.encode("utf-8", "surrogateescape")).digest())


def hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _kind(path: Path) -> str:
    if path.suffix in WHOLE_FILES:
        return "text"
    if path.name.endswith(JSONL_FILES):
        return "jsonl"
    if path.name.startswith("cache-"):  # results that `datasets` keeps beside a data set
        return ""
    return path.suffix[1:] if path.suffix in RECORD_FILES else ""


def _file(path: Path, root: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(path.relative_to(root).as_posix(), path, _kind(path), stat.st_size, stat.st_mtime_ns)
