"""Files against the list a manifest keeps of them: sizes, which cost nothing, and SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conf.errors import UserError

HASH_THREADS = 4  # hashing lets other threads run, and one core is slower than a good disk
Expected = Mapping[str, tuple[int, str]]
"""File name -> (bytes, SHA-256 as hex)."""


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def check_sizes(folder: Path, expected: Expected, remedy: str) -> None:
    """UserError, ending in `remedy`, for a file that is missing or has another size."""
    for name, (size, _) in expected.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: {remedy}")
        if file.stat().st_size != size:
            raise UserError(f"{file} holds {file.stat().st_size} bytes, not {size}: {remedy}")


def check_hashes(folder: Path, expected: Expected, remedy: str, share: slice = slice(None)) -> None:
    """As `check_sizes`, then the same for the content.

    `share`: of the checksums, large files first, for callers that divide the work; sizes are all compared.
    """
    check_sizes(folder, expected, remedy)
    by_size = sorted(expected, key=lambda name: (-expected[name][0], name))[share]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = list(pool.map(lambda name: sha256_file(folder / name), by_size))
    for name, digest in zip(by_size, digests, strict=True):
        if digest != expected[name][1]:
            raise UserError(f"{folder / name} is damaged (SHA-256 differs): {remedy}")
