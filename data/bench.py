"""How fast the loader is, whether a step waits for it, and what memory it takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import LoaderBenchConfig, StageConfig, StageDataConfig
from data.loader import TrainLoader
from data.manifest import Manifest, save_manifest
from data.store import TokenStore
from data.writer import ShardWriter, write_split

SHARD = 1 << 24  # tokens
STEP_TOKENS = 1 << 17  # of the smallest step
WARM_STEPS = 3
Row = dict[str, Any]


def bench(config: LoaderBenchConfig, say: Callable[[str], None]) -> list[Row]:
    """A row for each length, packing and size of the set, on a set of random tokens in a temporary folder.

    Document lengths are log-normal around 600 tokens with a tenth around 13,000, as of web text and books.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moba-bench-") as folder:
        for tokens in config.set_tokens:
            store = _random_set(Path(folder) / str(tokens), tokens)
            for seq_len in config.seq_lens:
                for packing in ("concat", "best_fit"):
                    rows.append(_row(config, store, seq_len, packing))
                    say(_text(rows[-1]))
    return rows


def _row(config: LoaderBenchConfig, store: TokenStore, seq_len: int, packing: str) -> Row:
    global_batch = max(1, STEP_TOKENS // seq_len)
    per_step = global_batch * seq_len
    start = time.perf_counter()
    loader = _loader(store, seq_len, packing, global_batch)
    built = time.perf_counter() - start
    first, again = _timed(loader.step, 0), _timed(loader.step, loader.num_steps - 1)
    speed, growth = _raw(loader, config.seconds, per_step)
    waits = {
        kind: _waiting(_loader(store, seq_len, packing, global_batch), config, per_step, busy=kind == "busy")
        for kind in ("asleep", "busy")
    }
    return {
        "set_tokens": store.num_tokens, "seq_len": seq_len, "packing": packing, "step_tokens": per_step,
        "tokens_per_s": round(speed), "build_s": round(built, 3), "first_step_ms": round(1e3 * first, 2),
        "last_step_ms": round(1e3 * again, 2), "memory_growth_mib": growth, "own_memory_mib": _own_memory(),
        "waiting": {kind: round(share, 6) for kind, share in waits.items()},
    }  # fmt: skip


def _text(row: Row) -> str:
    waiting = ", ".join(f"{share:.3%} {kind}" for kind, share in row["waiting"].items())
    return (
        f"set of {row['set_tokens'] / 1e6:.0f}M, rows of {row['seq_len']:,}, {row['packing']}: "
        f"{row['tokens_per_s'] / 1e6:.1f}M tokens/s, waiting {waiting}, "
        f"memory growth {row['memory_growth_mib']} MiB"
    )


def _loader(store: TokenStore, seq_len: int, packing: str, global_batch: int) -> TrainLoader:
    data = StageDataConfig(domains={"random": 1.0}, packing=packing)
    tokens = seq_len * global_batch * 1_000_000  # a long run: steps are found by arithmetic, however far
    stage = StageConfig(seq_len=seq_len, tokens=tokens, global_batch=global_batch, data=data)
    return TrainLoader(stage, {"random": store}, seed=0, dp_rank=0, dp_world=1)


def _raw(loader: TrainLoader, seconds: float, per_step: int) -> tuple[float, float | None]:
    """Tokens/s in this thread, and how much the process's own memory grew from the third step to the last."""
    step = 0
    while step < WARM_STEPS:
        loader.step(step)
        step += 1
    before, start, first = _own_memory(), time.perf_counter(), step
    while time.perf_counter() - start < seconds:
        loader.step(step)
        step += 1
    elapsed, after = time.perf_counter() - start, _own_memory()
    growth = None if before is None or after is None else round(after - before, 1)
    return (step - first) * per_step / elapsed, growth


def _waiting(loader: TrainLoader, config: LoaderBenchConfig, per_step: int, *, busy: bool) -> float:
    """Share of the time spent waiting for batches by a consumer that takes per_step / tokens_per_s for a step:
    asleep (a GPU computes) or busy in Python, where it holds the interpreter's lock (the worst case). The first
    batch, for which a run waits once, does not count (`first_step_ms`)."""
    seconds_per_step = per_step / config.tokens_per_s
    steps = max(3, round(config.seconds / seconds_per_step))
    batches = iter(loader)
    next(batches)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        got = time.perf_counter()
        waited += got - asked
        if busy:
            while time.perf_counter() - got < seconds_per_step:
                pass
        else:
            time.sleep(seconds_per_step)
    share = waited / (time.perf_counter() - start)
    batches.close()
    return share


def _timed(call: Callable[[int], object], argument: int) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


def _own_memory() -> float | None:
    """MiB of this process that are not files in memory; None where Linux does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:"))


def _random_set(folder: Path, tokens: int) -> TokenStore:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards = []
    for number, lengths in enumerate(_shards_of_lengths(rng, tokens)):
        writer = ShardWriter(folder, f"train-{number:05d}.bin", np.dtype(np.uint32))
        for index, length in enumerate(lengths):
            writer.add(f"{number}-{index}", rng.integers(1, 128_000, length, dtype=np.uint32))
        shards.append(writer.finish())
    written = {"train": write_split(folder, "train", shards), "heldout": write_split(folder, "heldout", [])}
    files = {name: info for _, listed in written.values() for name, info in listed.items()}
    splits = {split: info for split, (info, _) in written.items()}
    save_manifest(Manifest({}, "none", 128_000, "uint32", splits, {}, files), folder)
    return TokenStore(folder, "train")


def _shards_of_lengths(rng: np.random.Generator, tokens: int) -> Iterator[Sequence[int]]:
    left = tokens
    while left > 0:
        short, long = rng.lognormal(6.4, 1.1, 9_000), rng.lognormal(9.5, 1.0, 1_000)
        lengths = rng.permutation(np.concatenate([short, long]).astype(np.int64) + 1)
        lengths = lengths[np.cumsum(lengths) <= min(left, SHARD) + lengths[0]]
        left -= int(lengths.sum())
        yield lengths.tolist()
