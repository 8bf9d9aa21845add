from __future__ import annotations

import pytest

from conf.errors import UserError
from conf.schema import AttentionConfig
from model.schedule import FULL, LayerPlan, describe, full_plans, plan

M = LayerPlan("moba", 512, 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [M, M, M, M, M, M]),
        ({"kind": "full"}, [FULL] * 6),
        ({"full_last_layers": 2}, [M, M, M, M, FULL, FULL]),
        ({"full_last_layers": 6}, [FULL] * 6),
        ({"full_every": 2}, [M, FULL, M, FULL, M, FULL]),
        ({"full_every": 4}, [M, M, M, FULL, M, M]),
        ({"full_every": 1}, [FULL] * 6),
        ({"full_layers": [0, 3]}, [FULL, M, M, FULL, M, M]),
        ({"full_layers": [0], "full_every": 3, "full_last_layers": 1}, [FULL, M, FULL, M, M, FULL]),
    ],
)
def test_which_layers_stay_full(settings: dict[str, object], expected: list[LayerPlan]) -> None:
    attention = AttentionConfig(**{"kind": "moba", "block_size": 512, "topk": 3, **settings})  # type: ignore[arg-type]
    assert plan(attention, 6, 0.5) == tuple(expected)


@pytest.mark.parametrize(
    ("fraction", "kind"), [(0.0, "moba"), (0.899, "moba"), (0.9, "full"), (0.95, "full"), (1.0, "full")]
)
def test_full_after_a_share_of_the_tokens(fraction: float, kind: str) -> None:
    assert {p.kind for p in plan(AttentionConfig(kind="moba", full_after=0.9), 2, fraction)} == {kind}


def test_full_after_one_means_never() -> None:
    assert plan(AttentionConfig(kind="moba"), 1, 1.0)[0].kind == "moba"


@pytest.mark.parametrize(
    ("fraction", "topk"), [(0.0, 32), (0.099, 32), (0.1, 16), (0.2, 8), (0.299, 8), (0.3, 3), (1.0, 3)]
)
def test_topk_warmup_steps(fraction: float, topk: int) -> None:
    attention = AttentionConfig(kind="moba", topk=3, topk_warmup=[32, 16, 8], topk_warmup_until=0.3)
    assert plan(attention, 1, fraction)[0].topk == topk


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "window"}, "attention.kind"),
        ({"topk": 0}, "attention.topk"),
        ({"topk_warmup": [4, 0], "topk_warmup_until": 0.5}, "topk_warmup"),
        ({"topk_warmup": [4]}, "topk_warmup_until"),
        ({"topk_warmup_until": 0.5}, "topk_warmup_until"),
        ({"block_size": 0}, "attention.block_size"),
        ({"full_layers": [6]}, "attention.full_layers"),
        ({"full_layers": [-1]}, "attention.full_layers"),
        ({"full_last_layers": 7}, "attention.full_last_layers"),
        ({"full_every": -1}, "attention.full_every"),
    ],
)
def test_impossible_plans_name_the_key(settings: dict[str, object], key: str) -> None:
    attention = AttentionConfig(**{"kind": "moba", **settings})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=key):
        plan(attention, 6, 0.0)


@pytest.mark.parametrize(
    ("plans", "text"),
    [
        (full_plans(4), "full"),
        ((M,) * 3, "moba 512x3"),
        ((M,) * 29 + full_plans(3), "0-28 moba 512x3, 29-31 full"),
        ((FULL, M, FULL), "0 full, 1 moba 512x3, 2 full"),
    ],
)
def test_describe(plans: tuple[LayerPlan, ...], text: str) -> None:
    assert describe(plans) == text
