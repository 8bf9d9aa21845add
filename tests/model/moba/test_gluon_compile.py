"""What the compiler makes of the warp-specialised kernels, read from the machine code; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from model.moba.hopper import MEASURED_WITH  # noqa: E402

# With other versions the kernels are compiled here and run nowhere; registers are allotted otherwise.
MEASURED = triton.__version__.startswith(f"{MEASURED_WITH}.")
ROOT = Path(__file__).resolve().parents[3]
# Bytes of stack that hold addresses and bounds from before the loops, for behind them.
KNOWN_STACK = {"dkv": 48, "merge": 48, "fused": 64 if MEASURED else 136, "fused64": 176}


@pytest.fixture(scope="module")
def kernels():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.moba.compile_gluon"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["routed", "dq", "dkv", "combine", "merge", "fused", "fused64", "combine64", "merge64", "dkv64"]
    assert [k["kernel"] for k in found] == names
    return found


def test_hopper_matrix_instructions_and_no_others(kernels):
    for kernel in kernels:
        assert kernel["hopper_mma"] > 0 and kernel["old_mma"] == 0, kernel


def test_registers_are_dealt_out_to_the_consumers(kernels):
    for kernel in kernels:
        assert kernel["dealt_registers"] >= 2, kernel


def test_matrix_instructions_overlap(kernels):
    """Several are under way at once, and the exponentials of a step run before the wait for the last of them.

    The fused kernel waits for products after its exponentials too; of 32 (head_dim 64: 64) a few may come late.
    """
    for kernel in kernels:
        hidden = kernel["exposed"] <= 12 if "fused" in kernel["kernel"] else kernel["overlapped"] >= 16
        assert not kernel["serial"] and hidden, kernel


def test_no_floating_point_atomics(kernels):
    assert [k["kernel"] for k in kernels if k["float_atomics"]] == []


def test_no_spills(kernels):
    """dk, dv: addresses for the end of the kernel, and five accesses in the masked loop over the own block.

    Fused: two addresses in the loop over the own block; at head_dim 64, whose steps are twice as long, scores too.
    """
    stack = {k["kernel"]: k["stack"] for k in kernels}
    for name, known in KNOWN_STACK.items():
        assert stack.pop(name) <= known, kernels
    assert set(stack.values()) == {0}, stack
    loops = {k["kernel"]: k["loop_spills"] for k in kernels}
    assert loops.pop("dkv") <= 8 and loops.pop("fused64") <= 54, loops
    assert loops.pop("fused") <= (4 if MEASURED else 13), loops
    assert set(loops.values()) == {0}, loops


def test_programs_fit_a_multiprocessor(kernels):
    """One program of twelve warps: 64 Ki registers and 227 KiB of shared memory."""
    for kernel in kernels:
        assert kernel["registers"] * 32 * 12 <= 65536 and kernel["shared"] <= 227 * 1024, kernel
