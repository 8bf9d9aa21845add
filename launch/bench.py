"""`moba bench`: measure the parts."""

from __future__ import annotations

from collections.abc import Sequence

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import BenchConfig
from launch.command import Command


def resolve(overrides: Sequence[str]) -> BenchConfig:
    """`moba bench NAME key=value ...`; the name may come first without its key."""
    named = [f"name={overrides[0]}", *overrides[1:]] if overrides and "=" not in overrides[0] else overrides
    return compose("bench", named)


def run(config: BenchConfig) -> int:
    from eval.bench.attention import run as run_attention

    check_fields(config)
    run_attention(config)
    return 0


COMMAND = Command(
    name="bench",
    summary="time the attention kernels beside dense attention on one GPU",
    text="""
moba bench attention: every row is first checked against exact samples, then timed forward and backward beside
cuDNN and flash attention. Prints a table; out=FILE.json writes it, with a picture beside.

rule=true measures the two exact paths (routed and union) over a grid of densities and block sizes and rewrites the
stored rule that picks one per shape, model/moba/triton_rule.json (out=FILE.json: another file). rows= replaces the
grid; documents= packs the rows.
""",
    examples=(
        "moba bench attention",
        "moba bench attention rows=[32768/32/8/128/512/3] routing=sink",
        "moba bench attention rule=true",
        "moba bench attention out=benchmarks/results/attention-h200.json",
    ),
    resolve=resolve,
    run=run,
)
