"""torchrun with an honest exit code: `python -m launch.elastic LOG_DIR <torchrun arguments>`.

torchrun itself exits with 1 whatever happened to its workers. Here a worker's exit code 2 (bad input, already
told by rank 0) comes through, and any other failure is one line that names the rank and its log.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.constants import EXIT_USER_ERROR
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
    # Its warnings tell of each worker it ends, in many lines; the summary below says it in one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    log_dir, *arguments = argv
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return _explain(error, Path(log_dir))
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0


def _explain(error: ChildFailedError, log_dir: Path) -> int:
    if any(failure.exitcode == EXIT_USER_ERROR for failure in error.failures.values()):
        return EXIT_USER_ERROR
    # The first to fall is the cause; -SIGTERM is our own agent ending the others.
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode == -15, item[1].timestamp))
    how = (
        f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
    )
    logs = sorted(log_dir.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"), key=os.path.getmtime)
    where = f"its output is in {logs[-1]}" if logs else "its output is above"
    complain(f"worker rank {rank} {how}; {where}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
