"""A hash of the tokens of a global batch that does not depend on how ranks and micro-batches share its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from data.batch import Batch

_MASK = (1 << 64) - 1


def rows_hash(batches: Iterable[Batch]) -> int:
    """Sum over all rows, modulo 2^64, of a 64-bit BLAKE2b hash of the row's token ids (little-endian int64).

    A sum has no order, so adding up the hashes of all ranks gives the hash of the global batch; a row that is
    missing, doubled, changed or of another step changes it. Call on host batches. Unsigned.
    """
    total = 0
    for batch in batches:
        for row in batch.input_ids.numpy().astype("<i8", copy=False):
            digest = hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=8).digest()
            total += int.from_bytes(digest, "little")
    return total & _MASK


def as_signed(value: int) -> int:
    """The same 64 bits as a signed integer: what an int64 tensor holds. Its sums wrap around modulo 2^64."""
    return value - (1 << 64) if value >> 63 else value


def as_text(value: int) -> str:
    """16 hexadecimal digits of the 64 bits of `value`, signed or not."""
    return f"{value & _MASK:016x}"
