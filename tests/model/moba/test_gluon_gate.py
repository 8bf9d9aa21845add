"""What the compiler makes of the specialised gate, without a GPU. Whether it is right: test_gluon_gate_gpu.py."""

import json
import os
import subprocess
import sys
from math import comb
from pathlib import Path

import pytest

pytest.importorskip("triton")
from model.moba import gluon_gate, hopper
from model.moba.gluon_streams import depth_for

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def kernels():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.moba.compile_gate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    return found


def test_a_step_takes_no_more_than_comparisons_of_its_scores(kernels):
    for kernel in kernels:
        # a step has 32 scores a thread; each is compared twice per place of its stream, once at the last
        assert kernel["compared"] == 32 * (2 * kernel["depth"] - 1), kernel
        assert 32 <= kernel["packed"] < 40, kernel  # one instruction puts a group number into a score
        assert kernel["hopper_mma"] > 0 and kernel["old_mma"] == 0 and not kernel["serial"], kernel


def test_registers_and_shared_memory_suffice(kernels):
    for kernel in kernels:
        assert kernel["loop_spills"] == 0 and kernel["stack"] <= 48, kernel
        assert kernel["shared"] <= 227 << 10, kernel


def test_no_floating_point_atomics(kernels):
    assert [kernel for kernel in kernels if kernel["float_atomics"]] == []


@pytest.mark.parametrize("num_past", range(1, 17))
def test_streams_are_as_deep_as_needed(num_past):
    depth = depth_for(num_past, 16, 1e-2)
    assert depth == num_past or comb(num_past, depth) / 16 ** (depth - 1) <= 1e-2
    assert depth == 1 or comb(num_past, depth - 1) / 16 ** (depth - 2) > 1e-2
    assert gluon_gate.constants(128, 4, num_past, 300)["EXACT"] == (depth == num_past)


def test_where_it_runs(monkeypatch):
    monkeypatch.setattr(hopper, "_unusable", lambda: None)
    assert hopper.gate_refusal(128, 81, 16) is None and hopper.gate_refusal(64, 8192, 7) is None
    assert "80 blocks" in hopper.gate_refusal(128, 80, 7)
    assert "17 of them" in hopper.gate_refusal(128, 300, 17)
    assert hopper.gate_refusal(96, 300, 7) == "head_dim 96"
    with hopper.twins_only():
        assert hopper.gate_refusal(128, 300, 7) == "switched off"
