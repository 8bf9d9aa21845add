"""`moba bench loader`: is the loader fast enough, on this machine's CPU?"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.compose import compose
from conf.ranges import check_fields
from conf.schema import LoaderBenchConfig
from launch.command import Command


def resolve(overrides: Sequence[str]) -> LoaderBenchConfig:
    return compose("bench_loader", overrides)


def run(config: LoaderBenchConfig) -> int:
    """Measure, print a line per row, write `out`. 1 if a step would wait too long."""
    from data.bench import bench
    from eval.files import write_json

    check_fields(config)
    load = os.getloadavg()[0]
    rows = bench(config, lambda line: print(line, flush=True))
    worst = max(share for row in rows for share in row["waiting"].values())
    report = {
        "benchmark": "loader",
        **environment(),
        "load_before": round(load, 2),
        "consumer_tokens_per_s": config.tokens_per_s,
        "largest_waiting_share": worst,
        "rows": rows,
    }
    if config.out:
        write_json(Path(config.out), report)
        print(f"wrote {config.out}")
    fine = worst < config.limit
    print(
        f"a step of {config.tokens_per_s:,} tokens/s waits {worst:.3%} at most: {'fine' if fine else 'too long'}"
    )
    return 0 if fine else 1


def environment() -> dict[str, Any]:
    """Date, versions, cores and commit."""
    import numpy
    import torch

    from eval.bench.environment import commit, today

    return {
        "date": today(),
        "commit": commit(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


COMMAND = Command(
    name="bench loader",
    summary="time the loader: tokens/s, waiting of a step, memory",
    text="""
Packs random documents, forward from step 0, with all that training does up to the copy to the device. A consumer
that takes tokens_per_s, asleep (as while a GPU computes) or busy in Python (the worst case), measures how long it
waits. Memory is the process's own, without the files it maps. Exit code 1 above `limit`.
""",
    examples=(
        "moba bench loader",
        "moba bench loader tokens_per_s=500000 seq_lens=[1048576] out=loader.json",
    ),
    resolve=resolve,
    run=run,
)
