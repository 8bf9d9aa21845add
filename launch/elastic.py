"""torchrun with an honest exit code: `python -m launch.elastic LOG_DIR <torchrun arguments>`.

torchrun itself exits with 1 whatever happened to its workers. Here what a worker meant by its exit code comes
through (`conf.constants`); any other failure is one line that names the rank and its log.

torchrun gives workers 30 seconds after a signal. Here SIGTERM, SIGUSR1 and SIGINT are passed on and the workers
take the time they need to save; whoever sent the signal decides how long that may be.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from conf.constants import EXIT_DIVERGED, EXIT_REQUEUE, EXIT_STALLED, EXIT_USER_ERROR
from conf.errors import complain
from conf.process import follow_parent

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_INTERRUPTED = 128 + signal.SIGINT  # the second Ctrl-C
_STOPPED = {EXIT_REQUEUE, *(-number for number in _SIGNALS)}


def main(argv: list[str]) -> int:
    """Run the workers to their end and return the exit code for all of them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    follow_parent()
    # This process only watches, and its log tells of each worker it ends: the summary below says it in one line.
    logging.disable(logging.ERROR)
    log_dir, *arguments = argv
    received = _pass_signals_on()
    try:
        run(parse_args(["--signals-to-handle", "SIGHUP,SIGQUIT", *arguments]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if EXIT_INTERRUPTED in codes:
            return EXIT_INTERRUPTED
        if received and codes <= _STOPPED:
            return EXIT_REQUEUE  # some before they could listen: there was nothing to save yet
        return _explain(error, Path(log_dir))
    except SignalException as caught:
        return 128 + int(caught.sigval)
    return 0


def _pass_signals_on() -> list[int]:
    """Send SIGTERM, SIGUSR1 and SIGINT to the workers, which are in sessions of their own; the ones received."""
    import psutil  # comes with DeepSpeed

    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    for number in _SIGNALS:
        signal.signal(number, forward)
    return received


def _explain(error: ChildFailedError, log_dir: Path) -> int:
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if EXIT_USER_ERROR in codes.values():
        if codes.get(0) != EXIT_USER_ERROR:  # rank 0 saw nothing wrong: what was told is in another's log
            rank = next(rank for rank, code in codes.items() if code == EXIT_USER_ERROR)
            _relay(_log_of(log_dir, error.failures[rank].local_rank))
        return EXIT_USER_ERROR
    if EXIT_STALLED in codes.values():
        if codes.get(0) != EXIT_STALLED:  # rank 0 is the one that stood still
            rank = next(rank for rank, code in codes.items() if code == EXIT_STALLED)
            _relay(_log_of(log_dir, error.failures[rank].local_rank))
        return EXIT_STALLED
    for code in (EXIT_DIVERGED, EXIT_REQUEUE):
        if code in codes.values():
            return code
    # The first to fall is the cause; -SIGTERM is our own agent ending the others.
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode == -15, item[1].timestamp))
    how = (
        f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
    )
    log = _log_of(log_dir, failure.local_rank)
    complain(f"worker rank {rank} {how}; its output is {f'in {log}' if log else 'above'}")
    return 1


def _log_of(log_dir: Path, local_rank: int) -> Path | None:
    """The newest log of a rank; None for a rank that writes to the terminal."""
    logs = sorted(log_dir.glob(f"*/attempt_*/{local_rank}/stderr.log"), key=os.path.getmtime)
    return logs[-1] if logs else None


def _relay(log: Path | None) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log else []
    for line in [line for line in lines if line.startswith("error:")][:1]:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
