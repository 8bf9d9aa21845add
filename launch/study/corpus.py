"""The text of the studies: source code and documentation that lie on this machine, without near-duplicates.

Files of a package become documents of a package's neighbouring files: long ones of LONG characters while the
package lasts, then ones of MEDIUM, then what is left. Each document is a folder, so that `moba prepare` with
`read.repos=1` reads it as a repository: a file is in one document, and a document is held out or trained on whole.

Near-duplicates: a shingle is four consecutive lines (stripped, empty ones and repeats left out). A file of whose
shingles more than SEEN were in files before it is left out. This is exact, takes one pass, and also finds a file
put together from several others.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import UserError
from data.sources import WHOLE_FILES
from eval.files import write_json

LONG, MEDIUM = 620_000, 160_000  # characters: above 128K and 32K tokens with a vocabulary of 8 to 16 thousand
SHINGLE = 4  # lines
SEEN = 0.3
SUFFIXES = (*WHOLE_FILES, ".rst", ".pyi")
SHORTEST, LONGEST = 400, 300_000  # characters of a file
ABOUT = "about.json"
Sizes = tuple[int, int]  # of long and medium documents, in characters


@dataclass
class Kept:
    """What the reading of the roots counted."""

    files: int = 0
    chars: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def leave(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def default_roots() -> list[Path]:
    """The standard library, installed packages and the documentation of this system, as far as they exist."""
    paths = sysconfig.get_paths()
    found = [Path(paths["stdlib"]), Path(paths["purelib"]), Path("/usr/lib/python3/dist-packages")]
    return [path for path in [*dict.fromkeys(found), Path("/usr/share/doc")] if path.is_dir()]


def build_corpus(
    out: Path, roots: Iterable[Path], max_chars: int, sizes: Sizes = (LONG, MEDIUM)
) -> dict[str, object]:
    """Write the documents of `roots` below `out`, one folder each; returns what `OUT-about.json` says.

    Raises:
        UserError: nothing usable below the roots.
    """
    roots, kept = list(roots), Kept()
    packages: dict[str, list[tuple[str, str]]] = {}
    seen: set[int] = set()
    for package, name, path in _files(roots):
        text = _readable(path, kept)
        if text is None or _duplicate(text, seen, kept):
            continue
        packages.setdefault(package, []).append((name, text))
        kept.files, kept.chars = kept.files + 1, kept.chars + len(text)
        if kept.chars >= max_chars:
            break
    if not packages:
        raise UserError(f"no usable text below {', '.join(map(str, roots))}: give text=[FOLDER]")
    documents, building = 0, out.with_name(f".tmp-{out.name}")
    shutil.rmtree(building, ignore_errors=True)
    for package, files in packages.items():
        for number, part in enumerate(_documents(files, sizes)):
            for name, text in part:
                place = building / f"{package}-{number:02d}" / f"{name}.txt"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(text.encode())
            documents += 1
    building.rename(out)
    about = {
        "roots": [root.name for root in roots], "files": kept.files, "chars": kept.chars, "documents": documents,
        "sizes": list(sizes), "left_out": kept.left_out,
        "near_duplicate": f"more than {SEEN:.0%} of {SHINGLE}-line shingles seen before",
    }  # fmt: skip
    write_json(out.with_name(f"{out.name}-{ABOUT}"), about)
    return about


def _files(roots: Iterable[Path]) -> Iterator[tuple[str, str, Path]]:
    """(package, name in it, path), packages in the order of a hash of their names, files by path."""
    listed = []
    for root in roots:
        skip = {"site-packages", "dist-packages", "__pycache__"}
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            if path.suffix not in SUFFIXES or skip & set(parts) or any(p.startswith(".") for p in parts):
                continue
            if len(parts) > 1 and not parts[0].endswith((".dist-info", ".egg-info")):
                listed.append((f"{root.name}-{parts[0]}", "/".join(parts[1:]), path))
    key = {package: hashlib.sha256(package.encode()).digest() for package, _, _ in listed}
    yield from sorted(listed, key=lambda item: (key[item[0]], item[1]))


def _readable(path: Path, kept: Kept) -> str | None:
    """The text of a file that somebody wrote; None for tables, generated code and what is no UTF-8."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 4 * LONGEST:
            kept.leave("link or too large")
            return None
        text = path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        kept.leave("not UTF-8")
        return None
    if not SHORTEST <= len(text) <= LONGEST:
        kept.leave("too short or too long")
        return None
    lines = text.splitlines()
    digits = sum(map(text.count, "0123456789")) / len(text)
    if digits > 0.1 or len(text) / len(lines) > 120 or max(map(len, lines)) > 2000 or "\0" in text:
        kept.leave("table or generated")
        return None
    return text


def _duplicate(text: str, seen: set[int], kept: Kept) -> bool:
    """Whether too much of the text was there before; else its shingles are remembered."""
    lines = list(dict.fromkeys(stripped for line in text.splitlines() if (stripped := line.strip())))
    cuts = range(max(1, len(lines) - SHINGLE + 1))
    shingles = {_hash("\n".join(lines[i : i + SHINGLE])) for i in cuts}
    if len(shingles & seen) > SEEN * len(shingles):
        kept.leave("near-duplicate")
        return True
    seen |= shingles
    return False


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _documents(files: list[tuple[str, str]], sizes: Sizes) -> Iterator[list[tuple[str, str]]]:
    """A package's files in documents: each takes files until it has its size."""
    long, medium = sizes
    left = sum(len(text) for _, text in files)
    part: list[tuple[str, str]] = []
    size = 0
    want = long if left >= long else medium
    for name, text in files:
        part.append((name, text))
        size, left = size + len(text), left - len(text)
        if size >= want:
            yield part
            part, size, want = [], 0, long if left >= long else medium
    if part:
        yield part
