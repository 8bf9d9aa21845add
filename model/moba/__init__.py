"""Mixture of Block Attention.

`choose.py` picks blocks, `reference.py` defines the result, `varlen.py` computes it with ordinary attention calls,
`triton_*.py` with Hopper kernels; `api.py` is what the rest of the project calls.
"""

from model.moba.api import attend_blocks, choose_blocks, moba_attention

__all__ = ["attend_blocks", "choose_blocks", "moba_attention"]
