"""`engine.deterministic`: what a worker sets, and equal bits of full attention on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from model.full import full_attention
from tests.gloo import GlooPool
from tests.model.moba.cases import borders, make_qkv, run
from tests.train import jobs
from train.determinism import WORKSPACE, set_deterministic


def is_deterministic() -> tuple[bool, bool]:
    """Of this process, and whether it fills new memory."""
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.are_deterministic_algorithms_enabled(), fills


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WORKSPACE, os.environ.get(WORKSPACE, ":16:8"))
    yield
    set_deterministic(False)


def test_every_worker_of_a_stage_is_set(pool1: GlooPool, prepared: Path, tmp_path: Path) -> None:
    for wanted in (True, False):
        config = jobs.chain_config(str(tmp_path / str(wanted)), str(prepared), max_steps=2)
        config.engine.deterministic = wanted
        assert pool1(jobs.stage, config, "short") == [0]
        assert pool1(is_deterministic) == [(wanted, False)]


def test_an_environment_that_says_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match=f"{WORKSPACE}=:0:0 in the environment .* set it to :4096:8"):
        set_deterministic(True)
    set_deterministic(False)
    monkeypatch.delenv(WORKSPACE)
    set_deterministic(True)
    assert os.environ[WORKSPACE] == ":4096:8" and torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [[4096], [2048, 2048], [1000, 700, 2396]], ids=str)
def test_full_attention_with_equal_bits(lengths: list[int], dtype: torch.dtype) -> None:
    """Long enough that the sums over queries are cut into parts; without the switch the last bits differ."""
    set_deterministic(True)
    qkv = [x.to("cuda", dtype) for x in make_qkv(4096, 8, 2, dim=64)]
    options = {"cu_seqlens": borders(lengths).cuda(), "max_seqlen": max(lengths)}
    first, *others = [run(lambda *x: full_attention(*x, **options), qkv) for _ in range(4)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    set_deterministic(False)
    fast = run(lambda *x: full_attention(*x, **options), qkv)
    for a, b in zip(first, fast, strict=True):
        assert float((a - b).norm() / b.norm()) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
