"""What of the data is wrong is told by the launcher, before a worker starts."""

from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import DataSetConfig, DomainRule, StageConfig, StageDataConfig, TrainConfig
from data.view import PLANS_FOLDER
from launch.train import prepare_data
from tests.data.build import write_store

CHATS = [[1, 2, 3, 4], [5, 6, 7]]


def config_of(folder: Path, packing: str, rule: DomainRule) -> TrainConfig:
    write_store(folder / "set", CHATS, loss=[[0, 0, 1, 1], [0, 1, 1]])
    config = TrainConfig()
    config.model.vocab_size = 1000
    config.data.sets = {"chats": DataSetConfig(path=str(folder / "set"))}
    data = StageDataConfig(domains={"a": 1.0}, rules={"a": rule}, packing=packing)
    config.stages = {"sft": StageConfig(8, 64, 1, data=data)}
    return config


@pytest.mark.parametrize(
    ("packing", "rule", "message"),
    [
        ("concat", DomainRule(set="chats"), r"stages\.sft: .*packing=concat would cut answers"),
        (
            "best_fit",
            DomainRule(set="chats", long="split"),
            r"stages\.sft: .*long=split would train on cut answers",
        ),
        ("best_fit", DomainRule(set="chats", min_length=9), r"stages\.sft: .*leaves none of 2 documents"),
    ],
)
def test_what_a_stage_cannot_use_is_told(tmp_path: Path, packing: str, rule: DomainRule, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_data(config_of(tmp_path, packing, rule), fresh=False)


def test_rows_are_packed_before_a_worker_waits_for_them(tmp_path: Path) -> None:
    prepare_data(config_of(tmp_path, "best_fit", DomainRule(set="chats")), fresh=False)
    assert any((tmp_path / "set" / PLANS_FOLDER).iterdir())
