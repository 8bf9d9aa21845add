"""`make soak`: a long run on two gloo processes, and what it leaves behind. Not part of the test suite.

2,000 steps in four stages with evaluation and saving all along. Memory, open files and threads of the workers are
sampled; they must not grow after the first stage, and nothing may be left when the run is over.

    python -m tests.soak [STEPS]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from conf.paths import RunPaths
from conf.schema import StageConfig, TokenizerConfig
from tests.gloo import GlooPool
from tests.train import jobs

GROWTH = 1.1  # of memory, last quarter against second quarter


def sample(out: list[dict[str, float]], stop: threading.Event) -> None:
    """Memory in MiB, open files and threads of all child processes, every two seconds."""
    while not stop.wait(2.0):
        children = psutil.Process().children(recursive=True)
        row = {"rss_mib": 0.0, "files": 0.0, "threads": 0.0, "processes": float(len(children))}
        for child in children:
            try:
                row["rss_mib"] += child.memory_info().rss / 2**20
                row["files"] += child.num_fds()
                row["threads"] += child.num_threads()
            except psutil.NoSuchProcess:
                continue
        out.append(row)


def quarter(rows: list[Any], index: int) -> list[Any]:
    size = max(1, len(rows) // 4)
    return rows[index * size : (index + 1) * size]


def main(steps: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    (folder / "text").mkdir()
    draw = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdkmt" for b in "aeiou" for c in "lnrs"]
    for i in range(60):
        (folder / "text" / f"{i}.txt").write_text(" ".join(draw.choice(words) for _ in range(300)))
    from data.prepare import prepare

    prepare(folder / "set", str(folder / "text"), 0.2, TokenizerConfig(train_vocab_size=320), progress=False)
    config = jobs.chain_config(str(folder / "run"), str(folder / "set"), zero_stage=2)
    config.stages = {
        f"stage{i}": StageConfig(
            32, steps // 4 * 4 * 32, 4, data=config.stages["short"].data,
            attention=config.stages["long" if i % 2 else "short"].attention,
        )
        for i in range(4)
    }  # fmt: skip
    config.eval.every, config.checkpoint.every = 50, 25
    samples: list[dict[str, float]] = []
    stop = threading.Event()
    threading.Thread(target=sample, args=(samples, stop), daemon=True).start()
    pool, start = GlooPool(2), time.monotonic()
    for name in config.stages:
        assert pool(jobs.stage, config, name, timeout=1800.0) == [0, 0], name
    seconds = time.monotonic() - start
    stop.set()
    pool.close()
    run = RunPaths(folder / "run")
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rates = [row["tokens_per_s"] for row in rows if row["kind"] == "train"]
    report: dict[str, Any] = {"steps": len(rates), "seconds": round(seconds), "processes_left": 0}
    for key in ("rss_mib", "files", "threads"):
        report[key] = [round(statistics.median(row[key] for row in quarter(samples, i)), 1) for i in range(4)]
    report["tokens_per_s"] = [round(statistics.median(quarter(rates, i))) for i in range(4)]
    # Python's own tracker of shared resources stays as long as the parent.
    left = [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]
    report["processes_left"] = len(left)
    report["left_in_checkpoints"] = sorted(p.name for p in run.checkpoints.iterdir() if p.name.startswith("."))
    print(json.dumps(report, indent=1))
    flat = all(report[key][3] <= GROWTH * report[key][1] for key in ("rss_mib", "files", "threads"))
    clean = not report["processes_left"] and not report["left_in_checkpoints"]
    return 0 if flat and clean and len(rates) == steps // 4 * 4 else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
