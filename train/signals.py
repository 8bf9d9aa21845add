"""A polite stop: the scheduler's SIGTERM or the user's Ctrl-C ends the run at a step border, saved."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

REPEAT_SECONDS = 1.0  # one Ctrl-C can arrive twice: from the terminal and through the launcher


class StopSignal:
    """`requested` turns true at SIGTERM, SIGUSR1 or SIGINT. A second SIGINT, later, ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._interrupted_at: float | None = None

    def install(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > REPEAT_SECONDS:
                os._exit(128 + signal.SIGINT)
            self._interrupted_at = self._interrupted_at or now
        self.requested = True
