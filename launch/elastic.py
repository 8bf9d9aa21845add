"""torchrun with an honest exit code: `python -m launch.elastic LOG_DIR <torchrun arguments>`.

torchrun itself exits with 1 whatever happened to its workers. Here a worker's 2 (bad input, told by it) and 75
(stopped by a signal, saved) come through; any other failure is one line that names the rank and its log.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.constants import EXIT_REQUEUE, EXIT_USER_ERROR
from conf.process import follow_parent
from launch.command import complain

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str]) -> int:
    """Run the workers to their end and return the exit code for all of them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    follow_parent()
    # This process only watches, and its log tells of each worker it ends: the summary below says it in one line.
    logging.disable(logging.ERROR)
    log_dir, *arguments = argv
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return _explain(error, Path(log_dir))
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0


def _explain(error: ChildFailedError, log_dir: Path) -> int:
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if EXIT_USER_ERROR in codes.values():
        if codes.get(0) != EXIT_USER_ERROR:  # rank 0 saw nothing wrong: what was told is in another's log
            rank = next(rank for rank, code in codes.items() if code == EXIT_USER_ERROR)
            _relay(_log_of(log_dir, error.failures[rank].local_rank))
        return EXIT_USER_ERROR
    if EXIT_REQUEUE in codes.values():
        return EXIT_REQUEUE
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
