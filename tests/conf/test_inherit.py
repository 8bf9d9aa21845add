from __future__ import annotations

from dataclasses import asdict

import pytest

from conf.compose import compose
from conf.errors import UserError
from conf.inherit import reach, stage_ropes
from conf.schema import RopeConfig, StageConfig, StageRopeConfig, TrainConfig
from conf.validate import validate

LLAMA3 = RopeConfig(kind="llama3", theta=500_000.0, factor=8.0, original_seq_len=8192)


def chain(*ropes: StageRopeConfig) -> dict[str, StageConfig]:
    return {f"s{index}": StageConfig(64, 256, 4, rope=rope) for index, rope in enumerate(ropes)}


@pytest.mark.parametrize(
    ("rope", "base", "wanted"),
    [
        (StageRopeConfig(), None, RopeConfig()),
        (StageRopeConfig(), LLAMA3, LLAMA3),
        (StageRopeConfig(theta=8e6), None, RopeConfig(theta=8e6)),
        (StageRopeConfig(factor=64.0), LLAMA3, RopeConfig("llama3", 500_000.0, 64.0, 8192)),
        (StageRopeConfig(kind="linear", factor=2.0), RopeConfig(theta=5e5), RopeConfig("linear", 5e5, 2.0)),
        (StageRopeConfig(kind="default"), LLAMA3, RopeConfig(theta=500_000.0)),
        (
            StageRopeConfig(kind="yarn", factor=4.0, original_seq_len=64, beta_fast=16.0),
            None,
            RopeConfig("yarn", factor=4.0, original_seq_len=64, beta_fast=16.0),
        ),
    ],
)
def test_a_stage_says_what_changes(rope: StageRopeConfig, base: RopeConfig | None, wanted: RopeConfig) -> None:
    assert stage_ropes(chain(rope), base) == {"s0": wanted}


def test_a_model_reads_what_it_was_trained_on_with_its_rope() -> None:
    """Long, then short, then with another RoPE; the folder at its start read 1000 tokens with the first."""
    wide = StageRopeConfig(**asdict(LLAMA3))
    stages = chain(wide, wide, StageRopeConfig(theta=8e6))
    for name, length in zip(stages, (512, 64, 128), strict=True):
        stages[name].seq_len = length
    config = TrainConfig(stages=stages)
    assert [reach(config, name) for name in stages] == [512, 512, 128]
    config.init.seq_len = 1000
    assert [reach(config, name) for name in stages] == [1000, 1000, 128]


def test_the_chain_goes_on_from_stage_to_stage() -> None:
    stages = chain(StageRopeConfig(factor=64.0), StageRopeConfig(), StageRopeConfig(theta=1e6))
    found = stage_ropes(stages, LLAMA3)
    assert found["s1"] == found["s0"] and found["s0"].factor == 64.0
    assert (found["s2"].kind, found["s2"].theta, found["s2"].factor) == ("llama3", 1e6, 64.0)


def test_complete_is_complete() -> None:
    stages = chain(StageRopeConfig(factor=64.0), StageRopeConfig(kind="linear", factor=2.0))
    once = stage_ropes(stages, LLAMA3)
    for name, rope in once.items():
        stages[name].rope = StageRopeConfig(**asdict(rope))
    assert stage_ropes(stages) == once == stage_ropes(stages, RopeConfig(theta=77.0))


def test_quickstart_is_as_written() -> None:
    found = stage_ropes(compose("train", ["recipe=quickstart", "out=x"]).stages)
    assert found == {"short": RopeConfig(), "long": RopeConfig(theta=4e4), "full": RopeConfig(theta=4e4)}


def test_what_is_inherited_is_validated() -> None:
    config = compose("train", ["recipe=smoke", "out=x", "stages.long.rope.factor=2"])
    with pytest.raises(UserError, match=r"stages\.long\.rope\.factor=2 has no meaning"):
        validate(config, 1)
    config = compose("train", ["recipe=smoke", "out=x", "stages.long.rope={kind: linear, factor: 0.5}"])
    with pytest.raises(UserError, match=r"stages\.long\.rope\.factor=0\.5: must be at least 1"):
        validate(config, 1)
