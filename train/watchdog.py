"""A rank that stands still ends the job, named, instead of letting all the others wait for it.

Every process has a thread that writes `logs/heartbeat/rank-00003.json`: the step and part of it its main thread is
in, since when, and the line of code. When a rank has not moved for `launch.timeout` seconds, its thread reads the
files of all ranks, says which rank the others wait for, and ends the process with EXIT_STALLED; torchrun ends the
rest. A process that is stopped or frozen writes no more, and is found by that; it is killed a moment
later, since torchrun would wait 30 seconds for it to answer a signal.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL

import psutil  # here: a thread that ends a stuck process must not wait for an import

from conf.constants import EXIT_STALLED

PLACES = ("start", "data", "step", "evaluate", "save", "end")  # in the order of a step
ROOT = Path(__file__).resolve().parents[1]
SILENT = 4  # missed writes after which a process counts as stopped


@dataclass(frozen=True)
class Beat:
    """Where one rank stands. Times in seconds since the epoch."""

    rank: int
    host: str
    pid: int
    step: int
    place: str
    since: float  # when it got there
    written: float
    line: str  # of code, in the main thread

    def text(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.since))
        return (
            f"rank {self.rank} (host {self.host}, process {self.pid}) has stood at step {self.step}, "
            f"{self.place}, since {clock}, in {self.line}"
        )


class Watchdog:
    """Heartbeat of one rank. `at` is called by the main thread at every move; it costs next to nothing."""

    def __init__(self, folder: Path, rank: int, timeout: float) -> None:
        """`timeout`: seconds without a move until the job ends; 0: never."""
        self._folder, self._rank, self._timeout = folder, rank, timeout
        self._interval = min(5.0, timeout / 6)
        self._place, self._step = "start", 0
        self._since, self._moved = time.time(), time.monotonic()
        self._main = threading.get_ident()
        self._ended = threading.Event()

    def start(self) -> Watchdog:
        if self._timeout:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write()  # replaces the file of an earlier start
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def at(self, place: str, step: int) -> None:
        """The main thread begins `place` (one of PLACES) of optimizer step `step`."""
        self._place, self._step = place, step
        self._since, self._moved = time.time(), time.monotonic()

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._write()
            if time.monotonic() - self._moved > self._timeout:
                time.sleep(SILENT * self._interval)  # until every rank that can has written where it stands
                if time.monotonic() - self._moved > self._timeout:
                    self._give_up()

    def _write(self) -> None:
        beat = Beat(
            self._rank, socket.gethostname(), os.getpid(), self._step, self._place, self._since, time.time(),
            self._line(),
        )  # fmt: skip
        path = self._folder / f"rank-{self._rank:05d}.json"
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            temporary.replace(path)
        except OSError:
            pass  # a full disk must not end the watch

    def _line(self) -> str:
        """The innermost line of this project's own code in the main thread."""
        frame = innermost = sys._current_frames().get(self._main)
        while frame is not None and not _is_ours(Path(frame.f_code.co_filename)):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "no code"
        name = Path(frame.f_code.co_filename)
        shown = name.relative_to(ROOT) if name.is_relative_to(ROOT) else name
        return f"{shown}:{frame.f_lineno} ({frame.f_code.co_name})"

    def _give_up(self) -> None:
        self._write()
        beats = read_beats(self._folder)
        alive_after = time.time() - SILENT * self._interval
        who = culprit(beats, alive_after) if beats else None
        if self._rank:
            time.sleep(1.0)  # rank 0 writes to the terminal; a moment later torchrun ends this process
        said = who.text() if who else f"rank {self._rank} does not move"
        print(f"error: no progress for {self._timeout:g} s (launch.timeout): {said}", file=sys.stderr, flush=True)
        frozen = [str(beat.pid) for beat in beats if beat.written < alive_after and _is_sibling(beat)]
        if frozen:  # a moment later, so that torchrun sees this process's exit code first
            command = ["sh", "-c", 'sleep 1; kill -9 "$@"', "sh", *frozen]
            subprocess.Popen(command, start_new_session=True, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        os._exit(EXIT_STALLED)


def _is_sibling(beat: Beat) -> bool:
    """Whether the process that wrote `beat` has this one's parent: a worker of the same torchrun."""
    try:
        return beat.host == socket.gethostname() and psutil.Process(beat.pid).ppid() == os.getppid()
    except psutil.NoSuchProcess:
        return False


def _is_ours(path: Path) -> bool:
    """Code of this project: not of an environment (.venv/lib/.../site-packages) that lies inside its folder."""
    return path.is_relative_to(ROOT) and "site-packages" not in path.relative_to(ROOT).parts


def read_beats(folder: Path) -> list[Beat]:
    """Where all ranks stand, by rank; unreadable files are left out."""
    beats = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            beats.append(Beat(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return beats


def culprit(beats: list[Beat], alive_after: float) -> Beat:
    """The rank the others wait for: one that no longer writes, else the one least far along.

    `alive_after`: a beat written before this time is of a process that is stopped, frozen or gone.
    """
    silent = [beat for beat in beats if beat.written < alive_after]
    if silent:
        return min(silent, key=lambda beat: beat.written)
    return min(beats, key=lambda beat: (beat.step, PLACES.index(beat.place), beat.since))
