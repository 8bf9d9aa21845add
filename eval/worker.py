"""One process of an evaluation that several share, as torchrun starts it: `python -m eval.worker CONFIG`."""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from conf.constants import EXIT_USER_ERROR
from conf.errors import UserError, complain
from conf.load import to_typed
from conf.process import follow_parent, leave
from conf.schema import EvalConfig
from eval.group import group_execution
from eval.run import follow, run


def main(arguments: list[str]) -> int:
    """Join the group torchrun describes; the first process evaluates, the others help. Returns the exit code."""
    follow_parent()
    config = to_typed(OmegaConf.load(arguments[0]), EvalConfig, arguments[0])
    try:
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Rank 0 scores and draws between two calls, for as long as it likes.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
        (run if dist.get_rank() == 0 else follow)(config, group_execution())
    except UserError as error:
        complain(error)
        leave(EXIT_USER_ERROR)  # no farewell: the others may wait in a collective
    except Exception:
        traceback.print_exc()
        leave(1)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
