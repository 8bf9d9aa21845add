"""Batches of a rank, with the state to resume behind each of them; and batches for evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from conf.constants import IGNORE_INDEX
from conf.errors import UserError
from conf.schema import StageConfig
from data.balance import deal
from data.batch import Batch, cu_seqlens_of
from data.packing import ConcatPacking, Pieces, Row, build_row
from data.source import StageSource
from data.store import TokenStore

log = logging.getLogger(__name__)

LoaderState = dict[str, Any]
"""Plain JSON: {"stage_step": steps done, "fingerprint": sha256 of the identity, "identity": its parts}."""

T = TypeVar("T")


class TrainLoader:
    """Iterates over the optimizer steps of a stage: `(micro-batches of this rank, state after the step)`.

    Step t consists of samples [t * global_batch, (t + 1) * global_batch); rank r takes the r-th equal slice of
    them, in order, cut into micro-batches; with `data.balance` they are dealt out by attention cost instead (see
    `data.balance`). World size and micro-batch size decide who computes a row, never which rows a step has. A
    background thread works `prefetch` steps ahead.
    """

    def __init__(
        self,
        stage: StageConfig,
        sets: Mapping[str, TokenStore],
        *,
        seed: int,
        dp_rank: int,
        dp_world: int,
        start_step: int = 0,
        name: str = "stage",
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            name: of the stage; part of the key of its random order.
            start_step: steps of the stage already done (`state["stage_step"]`).
            prefetch: steps prepared ahead; 0: no thread.
            pin_memory: page-lock the batches, so that `Batch.to` is asynchronous (needs CUDA).
        Raises:
            UserError: the global batch cannot be shared evenly, or see `data.source.StageSource`.
        """
        if stage.global_batch % (dp_world * stage.micro_batch):
            raise UserError(
                f"global_batch={stage.global_batch} is no multiple of micro_batch={stage.micro_batch} x "
                f"{dp_world} data-parallel ranks; {dp_world * stage.micro_batch} or a multiple would fit"
            )
        self.num_steps = stage.tokens // (stage.seq_len * stage.global_batch)
        self.source = StageSource(stage, sets, seed, name)
        self.fingerprint = hashlib.sha256(json.dumps(self.source.identity, sort_keys=True).encode()).hexdigest()
        self._global_batch, self._micro_batch = stage.global_batch, stage.micro_batch
        self._rows = stage.global_batch // dp_world
        self._rank, self._world = dp_rank, dp_world
        self._balance = stage.data.balance and dp_world > 1
        self._start, self._prefetch, self._pin = start_step, prefetch, pin_memory
        for domain, count in self.source.left_out.items():
            if count and dp_rank == 0 and start_step == 0:
                log.warning(
                    "%s: %d of the %d documents of %s are left out by its rule or as longer than seq_len=%d",
                    name, count, sets[domain].num_docs, domain, stage.seq_len,
                )  # fmt: skip

    def __len__(self) -> int:
        """Steps that remain."""
        return max(self.num_steps - self._start, 0)

    def __iter__(self) -> Generator[tuple[list[Batch], LoaderState], None, None]:
        """Steps from `start_step` to the end of the stage. Leaving the loop early stops the thread."""
        steps = range(self._start, self.num_steps)
        if self._prefetch == 0:
            return ((self.step(t), self.state(t + 1)) for t in steps)
        return prefetched(lambda t: (self.step(t), self.state(t + 1)), steps, self._prefetch)

    def step(self, t: int) -> list[Batch]:
        """This rank's micro-batches of step `t`, by arithmetic."""
        samples = self.samples(t)
        batches = []
        for start in range(0, self._rows, self._micro_batch):
            batch = collate([self.source.row(i) for i in samples[start : start + self._micro_batch]])
            batches.append(batch.pin_memory() if self._pin else batch)
        return batches

    def samples(self, t: int) -> list[int]:
        """The samples of this rank in step `t`, in the order of its micro-batches."""
        first = t * self._global_batch
        if not self._balance:
            start = first + self._rank * self._rows
            return list(range(start, start + self._rows))
        costs = [self.source.cost(first + i) for i in range(self._global_batch)]
        return [first + i for i in deal(costs, self._world, self._micro_batch)[self._rank]]

    def state(self, stage_step: int) -> LoaderState:
        """What a checkpoint keeps after `stage_step` steps. Its size does not depend on progress."""
        return {"stage_step": stage_step, "fingerprint": self.fingerprint, "identity": self.source.identity}

    def check_state(self, state: LoaderState) -> None:
        """UserError, naming each difference, if `state` belongs to another stream of tokens than this loader's."""
        if state.get("fingerprint") == self.fingerprint:
            return
        before, now = _flat(state.get("identity", {})), _flat(self.source.identity)
        differ = [
            f"{key} was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        raise UserError(
            f"the data changed since the checkpoint: {'; '.join(differ) or 'its state is damaged'}; "
            "restore it, or start a new run"
        )


def heldout_batches(store: TokenStore, seq_len: int, tokens: int, rows_per_batch: int = 1) -> Iterator[Batch]:
    """The first `tokens` tokens of `store` (rounded up to whole rows, at most all), packed, always the same.

    The last batch may have fewer rows; padding in the last row carries no label. Without weights: a measure counts
    each target once.
    """
    packing = ConcatPacking(store, seq_len)
    num_rows = min(-(-tokens // seq_len), packing.num_rows)
    for start in range(0, num_rows, rows_per_batch):
        batch = collate([packing.row(i) for i in range(start, min(start + rows_per_batch, num_rows))])
        yield replace(batch, weights=None)


def long_documents(store: TokenStore, seq_len: int, tokens: int) -> Iterator[Batch]:
    """One row a batch: the first `seq_len` tokens of a document with at least seq_len + 1, every target labelled.

    Documents in the order of the store until `tokens` tokens are given (rounded up to whole rows) or there is
    none left; nothing at all if no document is long enough.
    """
    long_enough = np.flatnonzero(np.diff(store.offsets) > seq_len)
    for doc in long_enough[: -(-tokens // seq_len)]:
        one = np.array([int(doc)]), np.zeros(1, np.int64), np.array([seq_len])
        yield replace(collate([build_row(store, Pieces(*one), seq_len)]), weights=None)


def collate(rows: Sequence[Row]) -> Batch:
    """Rows [S] to one batch [R, S]. If some rows have weights, the labels of the others weigh 1."""
    weights = None
    if any(row.weights is not None for row in rows):
        given = [(row.labels != IGNORE_INDEX) if row.weights is None else row.weights for row in rows]
        weights = torch.from_numpy(np.stack(given).astype(np.float32, copy=False))
    positions = np.stack([row.positions for row in rows])
    borders, longest = cu_seqlens_of(positions)
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(borders),
        max_seqlen=longest,
        weights=weights,
    )


def prefetched(make: Callable[[int], T], steps: range, depth: int) -> Generator[T, None, None]:
    """`make(t)` for each t in order, computed by a thread at most `depth` ahead.

    An exception of `make` is raised here, at its place in the order. Closing the generator (a `break`, an
    exception in the loop) stops the thread and waits for it.
    """
    ready: queue.Queue[tuple[T] | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[T] | BaseException) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for t in steps:
                if not put((make(t),)):
                    return
        except BaseException as error:  # belongs to the consumer, whatever it is
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        thread.join()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b` keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
