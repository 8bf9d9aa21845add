"""Without a GPU the Triton kernels run in Triton's interpreter, which must be on when they are first imported.

The variable does not stay set: processes that tests start compile, or fail to, as they would anywhere.
"""

import importlib
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.experimental.gluon")  # the interpreter imports it late
        importlib.import_module("model.moba.triton_backend")
        importlib.import_module("model.moba.triton_table")
    except ImportError:  # no Triton here: its tests say so
        pass
    del os.environ["TRITON_INTERPRET"]
