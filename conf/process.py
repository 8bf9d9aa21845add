"""Process care that launcher and workers share."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_parent(sig: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for `sig` when the parent process dies, however it dies. Linux only; elsewhere a no-op.

    Without it a SIGKILL of a launcher leaves workers behind that go on writing into the run folder.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), sig)


def leave(code: int) -> NoReturn:
    """End this process with `code`, written output flushed, without taking the interpreter apart.

    For workers of a process group, when everything they own is closed. A gloo thread may still hold the tensors of
    a finished collective; when it lets go of them after Python has begun to finalize, it needs the interpreter's
    lock, is refused, and the process dies of SIGABRT ("terminate called without an active exception") although all
    its work is done (pytorch issue 190489, pull request 179291).
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a reader that has gone
            stream.flush()
    os._exit(code)
