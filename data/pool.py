"""All parts of a set: in this process or in several, under one progress bar."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from data.encoder import Encoder
from data.folder import Unfinished
from data.parts import Job, Part, load_part, run_part, start_worker, work
from data.sources import Unit

_POLL_SECONDS = 0.5
_PARTS_PER_WORKER = 2  # a process is not worth its start for less


def run_parts(
    job: Job, groups: Sequence[Sequence[Unit]], tokenizer: Encoder, workers: int, progress: bool
) -> list[Part]:
    """Do the parts that are not finished yet; returns all, in order."""
    done = {n for n in range(len(groups)) if load_part(job.folder, n) is not None}
    left = [n for n in range(len(groups)) if n not in done]
    size = {n: sum(unit.bytes for unit in units) for n, units in enumerate(groups)}
    workers = workers or max(1, min(_cores(), len(left) // _PARTS_PER_WORKER))
    with _bar(progress, sum(size.values()), sum(size[n] for n in done)) as bar:
        if workers == 1:
            for n in left:
                run_part(job, n, groups[n], tokenizer, bar.add)
        else:
            _in_processes(job, groups, left, workers, bar)
    parts = [load_part(job.folder, n) for n in range(len(groups))]
    missing = [n for n, part in enumerate(parts) if part is None]
    if missing:
        raise RuntimeError(f"part {missing[0]} of {job.folder} was written and cannot be read")
    return [part for part in parts if part is not None]


def _in_processes(
    job: Job, groups: Sequence[Sequence[Unit]], left: Sequence[int], workers: int, bar: _Bar
) -> None:
    context = get_context("spawn")  # threads of the tokenizer or of torch do not survive a fork
    counters = context.Array("q", 3)
    pool = ProcessPoolExecutor(workers, context, start_worker, (job, counters))
    try:
        waiting = {pool.submit(work, n, groups[n]) for n in left}
        while waiting:
            finished, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            for future in finished:
                future.result()
            bar.show(*counters[:])
    except BrokenProcessPool as error:
        raise Unfinished(
            f"source {job.source}: a worker process died (out of memory?); the same command goes on with what is "
            f"finished, with workers={max(1, workers // 2)} perhaps"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Bar:
    """Documents, tokens, tokens/s and share of the source done."""

    def __init__(self, bar: Any, before: int) -> None:
        self._bar, self._before, self._start = bar, before, time.monotonic()
        self._task, self._counts = bar.task_ids[0], [0, 0, 0]

    def add(self, documents: int, tokens: int, text: int) -> None:
        """Count more of each; `text` in bytes."""
        self._counts = [a + b for a, b in zip(self._counts, (documents, tokens, text), strict=True)]
        self.show(*self._counts)

    def show(self, documents: int, tokens: int, text: int) -> None:
        rate = tokens / max(time.monotonic() - self._start, 1e-9)
        self._bar.update(self._task, completed=self._before + text, documents=documents, tokens=tokens, rate=rate)


@contextmanager
def _bar(progress: bool, total: int, before: int) -> Iterator[_Bar]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        TextColumn("{task.fields[documents]} documents, {task.fields[tokens]} tokens, {task.fields[rate]:,.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        bar.add_task("", total=total or None, completed=before, documents=0, tokens=0, rate=0.0)
        yield _Bar(bar, before)
        if total:
            bar.update(bar.task_ids[0], completed=total)
