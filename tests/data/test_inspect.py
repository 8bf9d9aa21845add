from pathlib import Path

import pytest

from conf.schema import DomainRule, StageConfig, StageDataConfig
from data.inspect import inspect
from tests.data.build import write_store


def test_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    sets = {
        "short": write_store(tmp_path / "short", [[1] * 7] * 50 + [[1] * 30] * 10),
        "long": write_store(tmp_path / "long", [[2] * 100] * 8 + [[2] * 9] * 5),
        "chats": write_store(tmp_path / "chats", [[3] * 16] * 20, loss=[[0] * 8 + [1] * 8] * 20),
    }
    data = StageDataConfig(
        domains={"short": 0.5, "long": 0.25, "chats": 0.25},
        rules={"long": DomainRule(min_length=10), "short": DomainRule(upsample={20: 2})},
        packing="best_fit",
    )
    stage = StageConfig(seq_len=32, tokens=32 * 80, global_batch=8, data=data)
    report = inspect(stage, sets, 0, "s", dp_world=2)
    assert (report.rows, report.total_rows) == (80, 80)
    short, long, chats = (report.domains[name] for name in ("short", "long", "chats"))
    assert (short.rows, long.rows, chats.rows) == (40, 20, 20)
    assert long.left_out == 5 and short.left_out == 0 and short.documents == 70
    assert set(short.by_length) == {8, 32} and set(long.by_length) == {128}
    assert sum(long.by_length.values()) == long.tokens == long.cut and chats.cut == 0
    assert chats.padding == 0 and chats.targets == 0.5 and short.targets == 1.0
    assert chats.epochs == 2.0  # 20 rows of the ten that the set has
    assert short.tokens + short.padding == 40 * 32
    assert report.padding == pytest.approx((short.padding + long.padding) / (80 * 32))
    assert 0 <= report.imbalance[1] <= report.imbalance[0]
