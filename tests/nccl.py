"""Worker processes as in `tests.gloo`, each with a GPU of its own, in one NCCL group."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from tests.gloo import GlooPool, answer


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    import warnings

    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world)
    answer(pipe)


class NcclPool(GlooPool):
    serve = staticmethod(_serve)
