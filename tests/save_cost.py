"""What saving in the background costs: `python -m tests.save_cost [EVERY]`, a quiet machine, about two minutes.

A model of 2.6 million parameters (31 MB of weights and moments) trains on two gloo processes, in turns of EVERY
steps (default 25): one turn without a save, one that begins with a save which is written meanwhile. The cost is
what a turn with a save takes longer, as a share of a turn without: the copy that training waits for, and what the
writing threads take from it. Medians, without the first two turns; `cpu` is processor time of rank 0, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conf.paths import RunPaths
from conf.schema import EngineConfig, ModelConfig, StageConfig, TrainConfig
from tests.gloo import GlooPool
from tests.train import jobs

TURNS = 8


def turns(config: TrainConfig, every: int) -> dict[str, Any]:
    """Seconds of each turn, without and with a save, and of the saves' blocking part. On every rank."""
    import torch.distributed as dist

    from train import loop
    from train.engine import init_distributed
    from train.run import build
    from train.saver import Saver
    from train.settle import settle
    from train.state import TrainState

    mesh = init_distributed(1)
    stage = config.stages["one"]
    state = TrainState("one")
    engine = build(config, "one", None, True, mesh)
    saver = Saver(RunPaths(Path(config.out)).checkpoints, engine, config, Path(config.out) / "tokenizer", mesh)
    run = loop.Run(
        config, stage, engine, mesh, state, jobs.endless_stream(stage, config.model.vocab_size, mesh),
        loop.MetricsLog(), loop.StopSignal(), evaluate=lambda plans: {}, save=lambda: None, saver=saver,
    )  # fmt: skip
    plans, tokens = loop.current_plans(run), stage.global_batch * stage.seq_len
    seconds: dict[str, list[float]] = {
        key: [] for key in ("without", "with", "blocked", "cpu without", "cpu with")
    }
    for turn in range(TURNS):
        dist.barrier()
        start, cpu, how = time.perf_counter(), time.process_time(), "with" if turn % 2 else "without"
        if turn % 2:
            saver.save(state)
            seconds["blocked"].append(time.perf_counter() - start)
        for _ in range(every):
            settle(run, loop.next_step(run, plans, tokens))
        seconds[how].append(time.perf_counter() - start)
        seconds[f"cpu {how}"].append(time.process_time() - cpu)
    saver.wait()
    return seconds


def main(every: int) -> int:
    with tempfile.TemporaryDirectory(prefix="save-cost-") as folder:
        return measure(Path(folder), every)


def measure(folder: Path, every: int) -> int:
    config = TrainConfig(out=str(folder), seed=1, engine=EngineConfig(1, "fp32"))
    config.model = ModelConfig(
        vocab_size=4096, hidden_size=160, intermediate_size=448, num_layers=4, num_heads=4, num_kv_heads=4
    )
    config.stages = {"one": StageConfig(256, 256 * 4 * 10**6, 4, micro_batch=2)}
    config.checkpoint.keep = 1
    pool = GlooPool(2)
    seconds = pool(turns, config, every, timeout=1800.0)[0]
    pool.close()
    middle = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    report = {
        "every": every,
        "step_ms": round(1000 * middle["without"] / every, 1),
        "blocked_ms": round(1000 * middle["blocked"], 1),
        "blocked_share": round(middle["blocked"] / middle["without"], 4),
        "whole_share": round(middle["with"] / middle["without"] - 1, 4),
        "cpu_share": round(middle["cpu with"] / middle["cpu without"] - 1, 4),
        "load": os.getloadavg()[0],
    }
    with contextlib.suppress(OSError):
        report["state_mb"] = sum(f.stat().st_size for f in folder.glob("checkpoints/*/*.safetensors")) // 10**6
    print(json.dumps(report | {key: [round(v, 2) for v in values] for key, values in seconds.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 25))
