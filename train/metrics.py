"""`metrics.jsonl`, wandb when asked for, and what the terminal shows. Only rank 0 owns one of these."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from conf.paths import RunPaths
from conf.schema import TrainConfig, WandbConfig
from train.files import replace_text, telling

PLAIN_SECONDS = 15.0  # between progress lines where the output is no terminal

Row = dict[str, Any]


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows with `step` up to the given one: those after it will be written again by the resumed run.

    A last line torn by a kill is dropped too. -1 keeps nothing.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= step:
            kept.append(line)
    replace_text(path, "".join(f"{line}\n" for line in kept))


class Sink(Protocol):
    """Somewhere rows go. `close` may be called once."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object per line, appended and handed over at once, so that a kill loses no finished step."""

    def __init__(self, path: Path, after_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_rows_after(path, after_step)
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, row: Row) -> None:
        """Raises SaveError where the disk is full; the torn line is dropped by the next start."""
        data = memoryview(json.dumps(row).encode() + b"\n")
        with telling(self._path):
            while len(data):
                data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


class WandbSink:
    """A wandb run that all stages of a chain share. `mode=offline` needs no account."""

    def __init__(self, config: WandbConfig, run_folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        identity = run_folder / "wandb" / "run_id"
        if not identity.is_file():
            identity.parent.mkdir(parents=True, exist_ok=True)
            replace_text(identity, secrets.token_hex(8))
        self._run = wandb.init(
            project=config.project,
            name=config.name or run_folder.name,
            mode=config.mode,  # type: ignore[arg-type]
            dir=str(run_folder),
            id=identity.read_text().strip(),
            resume="allow" if config.mode == "online" else None,
            config=settings,
        )

    def write(self, row: Row) -> None:
        values = {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step")}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class Terminal:
    """Progress of the whole chain: a rich bar on a terminal, a plain line every 15 seconds elsewhere."""

    def __init__(self, total_tokens: int, done_tokens: int, stage: str) -> None:
        self._total, self._stage = total_tokens, stage
        self._last_line = time.monotonic()
        self._progress: Any = None
        if sys.stdout.isatty():
            self._progress, self._task = _rich_bar(total_tokens, done_tokens, stage)
            self._progress.start()

    def write(self, row: Row) -> None:
        if row["kind"] == "bad":
            samples = "samples {} to {}".format(*row["samples"])
            self.say(f"[{row['stage']}] step {row['step']}: {row['action']}: {row['reason']} ({samples})")
            return
        if row["kind"] != "train":
            where = f"[{row['stage']}] step {row['step']}"
            self.say(f"{where}: held-out loss {row['heldout_loss']:.4f} over {row['heldout_tokens']:,} tokens")
            return
        loss, rate = f"{row['loss']:.4f}", f"{row['tokens_per_s']:,.0f} tokens/s"
        left = _clock((self._total - row["tokens"]) / max(row["tokens_per_s"], 1e-9))
        if self._progress is not None:
            self._progress.update(self._task, completed=row["tokens"], loss=loss, rate=rate, left=left)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS or row["tokens"] >= self._total:
            self._last_line = time.monotonic()
            share = 100 * row["tokens"] / self._total
            text = f"[{self._stage}] step {row['step']}  loss {loss}  {rate}  {share:.0f} %  {left} left"
            print(text, flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _rich_bar(total: int, done: int, stage: str) -> tuple[Any, Any]:
    from rich.progress import BarColumn, Progress, TextColumn

    texts = [
        "{task.percentage:>3.0f} %",
        "loss {task.fields[loss]}",
        "{task.fields[rate]}",
        "{task.fields[left]} left",
    ]
    progress = Progress(TextColumn("{task.description}"), BarColumn(), *map(TextColumn, texts))
    task = progress.add_task(stage, total=total, completed=done, loss="-", rate="-", left="-")
    return progress, task


def _clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class MetricsLog:
    """Fans rows out to the sinks. On ranks other than 0 it has none."""

    def __init__(self, sinks: Iterable[Sink] = (), terminal: Terminal | None = None) -> None:
        self._terminal = terminal
        self._sinks: list[Sink] = [*sinks, *([terminal] if terminal else [])]

    def write(self, row: Row) -> None:
        for sink in self._sinks:
            sink.write(row)

    def say(self, text: str) -> None:
        if self._terminal is not None:
            self._terminal.say(text)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def open_metrics(config: TrainConfig, stage: str, after_step: int, done: int, total: int) -> MetricsLog:
    """Rank 0's log for one stage: `done` of `total` tokens of the chain are behind it."""
    paths = RunPaths(Path(config.out))
    sinks: list[Sink] = [JsonlSink(paths.metrics, after_step)]
    if config.metrics.wandb.mode != "disabled":
        from dataclasses import asdict

        sinks.append(WandbSink(config.metrics.wandb, paths.root, asdict(config)))
    return MetricsLog(sinks, Terminal(total, done, stage))
