"""What the compiler makes of the hot kernels for Hopper, read from the machine code; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]

# Bytes of stack that are known and were measured to be faster than the same kernel without them: a tighter
# register cap gains another program per multiprocessor (combine, dk and dv at head_dim 64), or the spills are
# those of addresses outside the loops (dk and dv at 128, the union path).
KNOWN_STACK = {"combine": 64, "dkv": 64, "fused": 120, "merge": 24, "union": 120, "union_dkv": 40}
if not triton.__version__.startswith("3.6."):
    KNOWN_STACK |= {
        "combine": 112,
        "dkv": 88,
        "union": 128,
    }  # Triton 3.7.1 assigns registers otherwise; not timed
# Kernels in which ptxas waits for every matrix instruction, at 128 registers for two programs per multiprocessor,
# and which were measured to be faster so than one program without the waits.
KNOWN_SERIAL = {"routed 128 512", "union 128 512"}


@pytest.fixture(scope="module")
def kernels():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.moba.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hopper_matrix_instructions_and_no_others(kernels):
    assert len(kernels) == 24
    for kernel in kernels:
        assert kernel["hopper_mma"] > 0 and kernel["old_mma"] == 0, kernel


def test_no_floating_point_atomics(kernels):
    assert [k["kernel"] for k in kernels if k["float_atomics"]] == []


def test_no_spills_in_the_loops(kernels):
    for kernel in kernels:
        assert kernel["stack"] <= KNOWN_STACK.get(kernel["kernel"].split()[0], 0), kernel


def test_the_union_path_spills_nothing_in_its_loops(kernels):
    """Two loads of an address at the head of a masked (diagonal) step are let through."""
    loops = {k["kernel"]: k["loop_spills"] for k in kernels if k["kernel"].startswith("union")}
    assert len(loops) == 6 and max(loops.values()) <= 2, loops


def test_matrix_instructions_overlap(kernels):
    """ptxas serialises them (its note C7515, C7512) where accumulators pass between two pipelined loops."""
    assert {k["kernel"] for k in kernels if k["serial"]} == KNOWN_SERIAL


def test_programs_fit_a_multiprocessor(kernels):
    """64 Ki registers and 227 KiB of shared memory; the routed kernels and dq run two programs at a time."""
    for kernel in kernels:
        together = 2 if kernel["kernel"].split()[0] in ("routed", "dq", "union") else 1
        assert together * kernel["registers"] * 32 * kernel["warps"] <= 65536, kernel
        assert together * kernel["shared"] <= 227 * 1024, kernel
