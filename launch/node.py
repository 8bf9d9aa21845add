"""One machine's workers of a run on several: `python -m launch.node CONFIG STAGE NODE_RANK MASTER [--control]`.

`launch=slurm` and `launch=hostfile` start this on every machine. NODE_RANK `-` takes SLURM_NODEID.
With --control, standard input is a line to the one who started it: each line names a signal to
pass on, and its end means that he is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from conf.constants import EXIT_USER_ERROR
from conf.errors import UserError, complain
from conf.load import load_train_config
from conf.paths import RunPaths
from launch.local import start_workers, torchrun_command
from launch.rundir import run_lock


def main(argv: list[str]) -> int:
    """Run this machine's share of a stage to its end; the code of its workers."""
    control = argv[4:] == ["--control"]
    settings, stage, node, master = argv[:4]
    node_rank = int(os.environ["SLURM_NODEID"] if node == "-" else node)
    try:
        config = load_train_config(Path(settings))
        run = RunPaths(Path(config.out))
        if control:
            threading.Thread(target=_obey, daemon=True).start()
        command = torchrun_command(
            config.launch.nproc, run.logs, "train.run", settings, stage,
            nodes=config.launch.nodes, node_rank=node_rank, master=master,
        )  # fmt: skip
        with ExitStack() as stack:
            locks = (stack.enter_context(run_lock(run)),) if node_rank == 0 and not control else ()
            return start_workers(command, config.launch, locks)
    except UserError as error:
        complain(error)
        return EXIT_USER_ERROR


def _obey() -> None:
    for line in sys.stdin:
        number = getattr(signal, line.strip(), None)
        if isinstance(number, signal.Signals):
            os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
