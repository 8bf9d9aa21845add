"""Without a GPU the Triton kernels run in Triton's interpreter, which must be on when they are first imported.

The variable does not stay set: processes that tests start compile, or fail to, as they would anywhere.
"""

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

from tests.nccl import NcclPool

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.experimental.gluon")  # the interpreter imports it late
        importlib.import_module("model.moba.triton_again")
        importlib.import_module("model.moba.triton_backend")
        importlib.import_module("model.moba.triton_table")
        importlib.import_module("model.triton_decode")
        importlib.import_module("model.triton_decode_blocks")
        importlib.import_module("model.triton_decode_choice")
        importlib.import_module("model.triton_loss")
        importlib.import_module("train.triton_adamw")
    except ImportError:  # no Triton here: its tests say so
        pass
    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need devices this machine lacks are skipped, with the reason."""
    devices = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else int(item.get_closest_marker("gpu") is not None)
        if devices < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), there are {devices}"))


@pytest.fixture(scope="session")
def gpu_pools() -> Iterator[dict[int, NcclPool]]:
    """Worker processes with a GPU each, by their number; they start at the first call."""
    pools = {world: NcclPool(world) for world in (1, 2)}
    yield pools
    for pool in pools.values():
        pool.close()
