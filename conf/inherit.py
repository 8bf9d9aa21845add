"""RoPE along the chain of stages: a stage says what changes, the rest is that of the stage before."""

from __future__ import annotations

from dataclasses import fields, replace

from conf.schema import RopeConfig, StageConfig, TrainConfig

INHERIT = "inherit"


def stage_ropes(stages: dict[str, StageConfig], base: RopeConfig | None = None) -> dict[str, RopeConfig]:
    """The complete RoPE of every stage.

    Args:
        stages: in the order of the chain.
        base: RoPE of the weights that the first stage starts from; None: plain RoPE.

    A configuration that went through here once is complete: a second time changes nothing.
    """
    found: dict[str, RopeConfig] = {}
    before = base or RopeConfig()
    for name, stage in stages.items():
        before = found[name] = _follow(stage.rope, before)
    return found


def reach(config: TrainConfig, name: str) -> int:
    """Tokens that the model reads after stage `name`: the longest it was trained on with that stage's RoPE, by
    stages before too, and by those who made the folder that the run started from."""
    ropes, names = stage_ropes(config.stages), list(config.stages)
    lengths = [config.stages[one].seq_len for one in names[: names.index(name) + 1] if ropes[one] == ropes[name]]
    return max([*lengths, config.init.seq_len if ropes[names[0]] == ropes[name] else 0])


def _follow(rope: RopeConfig, before: RopeConfig) -> RopeConfig:
    start = before if rope.kind == INHERIT else RopeConfig(kind=rope.kind, theta=before.theta)
    values = {field.name: getattr(rope, field.name) for field in fields(RopeConfig) if field.name != "kind"}
    return replace(start, **{name: value for name, value in values.items() if value})
