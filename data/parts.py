"""The work of `moba prepare`, part by part: parts are independent, and a finished one is never done again.

Part n writes the shards `train-n.bin` and `heldout-n.bin` under their final names, then `part-n.npz` (names'
hashes and lengths), and last `part-n.json`, by a rename: with that file, the part is finished.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.process import follow_parent
from conf.schema import ReadConfig, SyntheticConfig
from data.encode import batches, encode
from data.encoder import Encoder, load_encoder
from data.manifest import SPLITS, FileInfo
from data.readers import Document, OnBad, read_unit
from data.sources import Unit
from data.tokenizer import load_tokenizer
from data.writer import Shard, ShardWriter, is_heldout

PART_BYTES = 8 << 20  # of source text in a part
MAX_PARTS = 8192  # larger sources get larger parts


@dataclass(frozen=True)
class Job:
    """What all parts of one set have in common.

    `tokenizer` and `folder` are folders; `source` is for messages; `light`: the tokenizer's backend alone will do.
    """

    folder: Path
    source: str
    tokenizer: Path
    heldout: float
    read: ReadConfig
    synthetic: SyntheticConfig
    dtype: str
    masked: bool
    weighted: bool
    eos_id: int
    first_id: int | None
    light: bool


@dataclass(frozen=True)
class Part:
    """A finished part. `skipped`: records that could not be used, as [place, reason]."""

    number: int
    shards: dict[str, Shard]
    skipped: list[tuple[str, str]]


def part_bytes(total: int) -> int:
    """Size of a part of a source of `total` bytes."""
    return max(PART_BYTES, -(-total // MAX_PARTS))


def group(units: Sequence[Unit], size: int) -> list[list[Unit]]:
    """The units of each part, in order: at least `size` bytes, or a hub shard each."""
    parts: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if filled >= size or (parts[-1] and unit.file.kind == "hub"):
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += unit.bytes
    return parts


def documents_of(
    unit: Unit, read: ReadConfig, synthetic: SyntheticConfig, tokenizer: Encoder, on_bad: OnBad
) -> Iterator[Document]:
    """All documents of a unit, whatever its kind."""
    if unit.file.kind == "synthetic":
        from data.synthetic import synthetic_documents

        return synthetic_documents(unit, synthetic, tokenizer)
    return read_unit(unit, read, on_bad)


def run_part(
    job: Job, number: int, units: Sequence[Unit], tokenizer: Encoder, report: Callable[[int, int, int], None]
) -> None:
    """Tokenise one part. `report(documents, tokens, bytes of text)` is called with what is done, on the way.

    Raises UserError for what cannot be read, and for the first bad record if those are fatal.
    """
    skipped: list[tuple[str, str]] = []

    def on_bad(place: str, reason: str) -> None:
        if job.read.on_error == "fatal":
            raise UserError(f"source {job.source}: {place}: {reason}; repair it, or set read.on_error=skip")
        skipped.append((place, reason))

    writers = {
        s: ShardWriter(job.folder, f"{s}-{number:05d}.bin", np.dtype(job.dtype), job.masked, job.weighted)
        for s in SPLITS
    }
    try:
        found = (d for u in units for d in documents_of(u, job.read, job.synthetic, tokenizer, on_bad))
        for batch in batches(found):
            tokens = 0
            for one in encode(batch, tokenizer, job.read, job.masked, on_bad):
                split = "heldout" if is_heldout(one.name, job.heldout) else "train"
                writers[split].add(one.name, one.ids, one.loss)
                tokens += len(one.ids)
            text = sum(_source_bytes(document) for document in batch)
            report(len(batch), tokens, text)
        shards = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    _save(job.folder, Part(number, shards, skipped))


def _source_bytes(document: Document) -> int:
    """About what it takes in its source, for the progress bar: a token id is five digits and a comma."""
    return len(document.plain.encode("utf-8", "replace")) if document.ids is None else 6 * len(document.ids)


def _save(folder: Path, part: Part) -> None:
    arrays = {f"{s}_{k}": getattr(shard, k) for s, shard in part.shards.items() for k in ("order", "lengths")}
    with _array_file(folder, part.number).open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    record: dict[str, Any] = {"skipped": part.skipped, "shards": {}}
    for split, shard in part.shards.items():
        files = {name: dataclasses.asdict(info) for name, info in shard.files.items()}
        record["shards"][split] = {"name": shard.name, "tokens": shard.tokens, "files": files}
    temporary = _part_file(folder, part.number).with_suffix(".partial")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(_part_file(folder, part.number))


def load_part(folder: Path, number: int) -> Part | None:
    """A finished part; None if it is not finished, or something of it is missing."""
    try:
        record = json.loads(_part_file(folder, number).read_text(encoding="utf-8"))
        arrays = np.load(_array_file(folder, number), allow_pickle=False)
        shards = {}
        for split, raw in record["shards"].items():
            files = {name: FileInfo(**info) for name, info in raw["files"].items()}
            if any((folder / name).stat().st_size != info.bytes for name, info in files.items()):
                return None
            shards[split] = Shard(
                raw["name"], raw["tokens"], files, arrays[f"{split}_order"], arrays[f"{split}_lengths"]
            )
        return Part(number, shards, [(place, reason) for place, reason in record["skipped"]])
    except (OSError, ValueError, KeyError):
        return None


def clear_records(folder: Path) -> None:
    """Remove what only the work itself needed."""
    for path in folder.glob("part-*"):
        path.unlink()


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"


def _array_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.npz"


_worker: tuple[Job, Encoder, Any] | None = None


def start_worker(job: Job, counters: Any) -> None:
    """Initialise a worker process: one thread, its own tokenizer, gone when its parent is."""
    import signal

    global _worker
    follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business: what runs is finished
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = load_encoder(job.tokenizer, job.eos_id, job.first_id) if job.light else load_tokenizer(job.tokenizer)
    _worker = job, encoder, counters


def work(number: int, units: Sequence[Unit]) -> int:
    """One part, in a worker process."""
    assert _worker is not None
    job, tokenizer, counters = _worker

    def report(*amounts: int) -> None:
        with counters.get_lock():
            for index, amount in enumerate(amounts):
                counters[index] += amount

    run_part(job, number, units, tokenizer, report)
    return number
