"""Randomness without state: hashes, and a permutation of any range computed one index at a time."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 4


def key_of(*parts: object) -> int:
    """A 64-bit key of any parts that print exactly (ints, strings). Stable across runs and machines."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def permute(index: int, size: int, key: int) -> int:
    """Image of `index` under a pseudo-random bijection of range(size) chosen by `key`.

    A Feistel network over the next even power of two, walked until the result falls into the range (four
    steps at most on average). O(1) time, no memory: nothing is shuffled and nothing is kept.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} of {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + round_number)) & mask)
        index = left << half | right
        if index < size:
            return index


def hashes(count: int, key: int = 0) -> np.ndarray:
    """A fixed pseudo-random uint64 for each of range(count), by splitmix64's finaliser; on every machine alike."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
