"""`moba bench generate`: measure prefill and decode by length, MoBA beside full attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import GenerateBenchConfig
from launch.command import Command, console


def resolve(overrides: Sequence[str]) -> GenerateBenchConfig:
    return compose("bench_generate", overrides)


def run(config: GenerateBenchConfig) -> int:
    """Measure, write the results and their picture, print the table."""
    check_fields(config)
    from eval.bench_generate import measure
    from eval.bench_generate_view import draw, line_of, print_table
    from eval.files import write_json

    report = measure(config, lambda row: print(line_of(row), flush=True))
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    draw(report, out.with_suffix(".png"))
    print_table(report, console())
    print(f"wrote {out} and {out.with_suffix('.png')}")
    return 0


COMMAND = Command(
    name="bench generate",
    summary="time prefill and decode by length: MoBA beside full attention, and the share of memory bandwidth",
    text="""
A model with random weights answers one prompt through the engine of `moba eval`, in bf16 on a GPU. Sampled queries
are compared with fp32 before anything is timed. Above full_up_to tokens full attention's prefill is not run: its
time is MoBA's with the attention exchanged, measured in one layer over all chunks, and marked as such.
""",
    examples=(
        "moba bench generate",
        "moba bench generate lengths=[131072,1048576] out=benchmarks/results/generate-h200.json",
        "moba bench generate model=tiny lengths=[256] block_size=32 topk=3 chunk=128 out=/tmp/g.json   # a CPU",
    ),
    resolve=resolve,
    run=run,
)
