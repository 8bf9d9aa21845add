"""Counting what the gate chose, against counting one by one in Python."""

from __future__ import annotations

import math

import pytest
import torch

from eval.gate_load import GateLoad
from model.moba import choose_blocks
from model.moba.blocks import build_block_table
from model.schedule import FULL, LayerPlan

BLOCK, TOPK = 16, 3
PLANS = (FULL, LayerPlan("moba", BLOCK, TOPK))
LENGTHS = [70, 5, 130, 16]
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()


def chosen() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(sum(LENGTHS), heads, 16, generator=g) for heads in (4, 2))
    return choose_blocks(q, k, block_size=BLOCK, topk=TOPK, cu_seqlens=CU)


def by_hand(ids: torch.Tensor) -> dict[str, float]:
    table = build_block_table(CU, sum(LENGTHS), BLOCK)
    own, first = table.own_block.tolist(), table.first_block.tolist()
    possible = {b for o, f in zip(own, first, strict=True) for b in range(f, o)}
    back, loads = [], [dict.fromkeys(possible, 0) for _ in range(ids.shape[1])]
    for t, heads in enumerate(ids.tolist()):
        for h, blocks in enumerate(heads):
            for b in blocks:
                if b >= 0:
                    back.append(own[t] - b)
                    loads[h][b] += 1
    shares = [[n / sum(load.values()) for n in load.values()] for load in loads]
    entropy = [-sum(p * math.log(p) for p in share if p) / math.log(len(possible)) for share in shares]
    return {
        "blocks_back": sum(back) / len(back),
        "nearest": back.count(1) / len(back),
        "never": sum(n == 0 for load in loads for n in load.values()) / (len(loads) * len(possible)),
        "entropy": sum(entropy) / len(entropy),
        "load_max": sum(max(share) * len(possible) for share in shares) / len(shares),
    }


def counted(ids: torch.Tensor) -> GateLoad:
    load = GateLoad.zeros(PLANS, "cpu")
    load.cu_seqlens = CU
    load.probe(1, torch.empty(0), torch.empty(0), ids)
    return load


@pytest.mark.parametrize("pieces", [1, 50])
def test_equals_counting_by_hand(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.gate_load._TOKENS", 221 // pieces + 1)
    ids = chosen()
    report = counted(ids).report()
    for name, value in by_hand(ids).items():
        assert report[name] == [None, pytest.approx(value)], name


def test_a_block_that_nobody_chose() -> None:
    ids = chosen()
    ids = torch.where(ids == 0, 1, ids)  # the first block of the first document
    want = by_hand(ids)
    assert counted(ids).report()["never"][1] == pytest.approx(want["never"]) and want["never"] > 0


def test_heads_may_be_counted_apart() -> None:
    """As the ranks of a sequence-parallel group do."""
    ids = chosen()
    table = counted(ids[:, :2]).table + counted(ids[:, 2:]).table
    torch.testing.assert_close(table, counted(ids).table)


def test_no_past_at_all() -> None:
    load = GateLoad.zeros(PLANS, "cpu")
    load.cu_seqlens = torch.tensor([0, 9], dtype=torch.int32)
    load.probe(1, torch.empty(0), torch.empty(0), torch.full((9, 4, 2), -1, dtype=torch.int32))
    assert all(values == [None, None] for values in load.report().values())
