"""A polite stop: the scheduler's SIGTERM or the user's Ctrl-C ends the run at a step border, saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

REPEAT_SECONDS = 1.0  # one Ctrl-C can arrive twice: from the terminal and through the launcher
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """`requested` turns true at SIGTERM, SIGUSR1 or SIGINT. A second SIGINT, later, ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> StopSignal:
        """From the main thread only."""
        _listen()
        for number in NUMBERS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            time.sleep(0.05)  # the listening thread goes first: not a line of this one runs after a second Ctrl-C


_ear: int | None = None  # the process's one pipe, which the interpreter writes signal numbers to


def _listen() -> None:
    """Start the thread that hears of signals, once per process.

    A handler in Python runs when the main thread is back in Python: not while it waits in a collective for a rank
    that is gone, or in a compiler. The interpreter's wake-up pipe is written at once.
    """
    global _ear
    if _ear is None:
        hear, _ear = os.pipe()
        os.set_blocking(_ear, False)
        threading.Thread(target=_leave_at_the_second, args=(hear,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(_ear, warn_on_full_buffer=False)


def _leave_at_the_second(hear: int) -> None:
    first: float | None = None
    while True:
        for number in os.read(hear, 64):
            if number != signal.SIGINT:
                continue
            now = time.monotonic()
            if first is not None and now - first > REPEAT_SECONDS:
                os._exit(128 + signal.SIGINT)
            first = now if first is None else first
