"""Where warp-specialised kernels run: where they were measured to win, else their Triton twins (`passes`).

The twins compute the same and are tested against each other. Gluon, in which the specialised kernels are written,
has no stable interface between versions of Triton: they are used with the version they were measured with, and
with others the twins run. `explain` says which and why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import triton

from model.moba import triton_common

MEASURED_WITH = "3.6"  # Triton
STEP, TILE_ROWS = 128, 128
# Blocks from which on each pass was measured to gain.
MIN_BLOCK = 256
MIN_COMBINE = 128
MIN_MERGE = {64: 128, 128: 256}  # by head_dim
MAX_OWN = {64: 512}  # combine, merge: by head_dim; with larger blocks they gain 1 or 2 % together
FUSED_BLOCK = 128  # dk, dv and partial dq in one kernel: a program holds a whole block
# At head_dim 64 the exponentials bound the forward pass, and dq is up to 5 % slower than its twin; dk, dv gains.
HEAD_DIMS = {
    "routed": (128,),
    "dq": (128,),
    "dkv": (64, 128),
    "fused": (64, 128),
    "combine": (64, 128),
    "merge": (64, 128),
}
# The gate gains from so many blocks on; lists of more places would not stay in registers.
GATE_BLOCKS, GATE_PAST, GATE_HEAD_DIMS = 81, 16, (64, 128)
_off = False
_log = logging.getLogger(__name__)


@contextmanager
def twins_only() -> Iterator[None]:
    """The Triton twins in every pass of this block: to compare the two."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@cache
def _unusable() -> str | None:
    if triton_common.INTERPRETED:
        return "Triton's interpreter runs (TRITON_INTERPRET)"
    if not triton.__version__.startswith(MEASURED_WITH + "."):
        return f"they were measured with Triton {MEASURED_WITH}, this is {triton.__version__}"
    return None


def refusal(head_dim: int, block_size: int, which: str) -> str | None:
    """Why the Triton twin of a pass (a key of HEAD_DIMS) runs; None: the specialised kernel does."""
    if _off:
        return "switched off"
    if head_dim not in HEAD_DIMS[which]:
        return f"head_dim {head_dim}"
    if which == "fused":
        return _unusable() if block_size == FUSED_BLOCK else f"blocks of {block_size} are not of {FUSED_BLOCK}"
    least = {"combine": MIN_COMBINE, "merge": MIN_MERGE[head_dim]}.get(which, MIN_BLOCK)
    if block_size < least or block_size % STEP:
        return f"blocks of {block_size} are below {least} or no multiple of {STEP}"
    if which in ("combine", "merge") and block_size > MAX_OWN.get(head_dim, block_size):
        return f"blocks of {block_size} are above {MAX_OWN[head_dim]} at head_dim {head_dim}"
    return _unusable()


def gate_refusal(head_dim: int, num_blocks: int, num_past: int) -> str | None:
    """As `refusal`, for the gate, whose time depends on the number of blocks and not on their size."""
    if _off or head_dim not in GATE_HEAD_DIMS:
        return "switched off" if _off else f"head_dim {head_dim}"
    few, long = num_blocks < GATE_BLOCKS, num_past > GATE_PAST
    return f"{num_blocks} blocks, {num_past} of them past ones" if few or long else _unusable()


def explain(head_dim: int, block_size: int) -> str:
    """One line: which kernels run the passes over lists of such a shape, and why."""
    passes = [which for which in HEAD_DIMS if which != "fused" or block_size <= FUSED_BLOCK]
    why = {which: refusal(head_dim, block_size, which) for which in passes}
    twins = ", ".join(f"{which}: {reason}" for which, reason in why.items() if reason is not None)
    specialised = ", ".join(which for which, reason in why.items() if reason is None)
    return f"warp-specialised: {specialised or 'none'}; Triton: {twins or 'none'}"


@cache
def _say(head_dim: int, block_size: int) -> None:
    _log.info("MoBA kernels, head_dim %d, blocks of %d: %s", head_dim, block_size, explain(head_dim, block_size))


def specialised(head_dim: int, block_size: int, which: str) -> bool:
    """Whether the specialised kernel of a pass runs; what runs is said once in the log (level INFO)."""
    if not _off:
        _say(head_dim, block_size)
    return refusal(head_dim, block_size, which) is None
