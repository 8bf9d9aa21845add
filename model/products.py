"""Matrix products whose sum is kept in fp32 whatever the dtype of the factors."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total_MC: Tensor | None, left_NM: Tensor, right_NC: Tensor) -> Tensor:
    """total + left^T right, fp32 [M, C], in place; with no total yet, the product.

    Many tiles are summed this way: in bf16 the small terms would be lost. On a GPU the sum happens inside the
    product, which is then never rounded to the factors' dtype; elsewhere the product is rounded first.
    """
    if left_NM.is_cuda and left_NM.dtype != torch.float32:
        if total_MC is None:
            return torch.mm(left_NM.t(), right_NC, out_dtype=torch.float32)
        return torch.addmm(total_MC, left_NM.t(), right_NC, out_dtype=torch.float32, out=total_MC)
    product = left_NM.t() @ right_NC
    return product.float() if total_MC is None else total_MC.add_(product)
