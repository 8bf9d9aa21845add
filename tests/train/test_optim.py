"""Learning rate by table; what is decayed."""

from __future__ import annotations

import pytest
import torch

from conf.schema import LrConfig, RopeConfig
from tests.train.jobs import tiny_config
from train.optim import lr_at, parameter_groups

CASES = [  # schedule, min_ratio, warmup, tokens of 1000 -> share of the peak
    ("constant", 0.1, 0.0, 1, 1.0),
    ("constant", 0.1, 0.1, 50, 0.5),
    ("constant", 0.1, 0.1, 1000, 1.0),
    ("linear", 0.0, 0.0, 250, 0.75),
    ("linear", 0.1, 0.2, 100, 0.5),
    ("linear", 0.1, 0.2, 200, 1.0),
    ("linear", 0.1, 0.2, 600, 0.55),
    ("linear", 0.1, 0.2, 1000, 0.1),
    ("cosine", 0.1, 0.2, 200, 1.0),
    ("cosine", 0.1, 0.2, 600, 0.55),
    ("cosine", 0.1, 0.2, 400, 0.1 + 0.9 * (1 + 2**-0.5) / 2),
    ("cosine", 0.1, 0.2, 1000, 0.1),
    ("cosine", 0.1, 0.2, 1200, 0.1),
    ("cosine", 0.1, 1.0, 1000, 1.0),
]


@pytest.mark.parametrize(("schedule", "min_ratio", "warmup", "tokens", "share"), CASES)
def test_lr_by_table(schedule: str, min_ratio: float, warmup: float, tokens: int, share: float) -> None:
    config = LrConfig(peak=3e-3, min_ratio=min_ratio, warmup=warmup, schedule=schedule)
    assert lr_at(config, tokens, 1000) == pytest.approx(3e-3 * share, rel=1e-12)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="schedule"):
        lr_at(LrConfig(schedule="wsd"), 500, 1000)


def test_matrices_decay_and_nothing_else() -> None:
    from model.transformer import CausalLM

    config = tiny_config()
    config.model.qk_norm = config.model.qkv_bias = True
    config.model.key_conv = 3
    model = CausalLM(config.model, RopeConfig(), "reference")
    names = {id(param): name for name, param in model.named_parameters()}
    decayed, plain = parameter_groups(model.named_parameters(), 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(p)].endswith(("norm.weight", "bias", "key_conv.weight")) for p in plain["params"])
    assert all(p.ndim == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_an_empty_group_is_left_out() -> None:
    groups = parameter_groups([("w.weight", torch.nn.Parameter(torch.ones(2, 2)))], 0.1)
    assert len(groups) == 1
