import numpy as np
import torch

from conf.constants import IGNORE_INDEX
from data.batch import Batch, cu_seqlens_of


def test_borders_follow_from_positions() -> None:
    positions = np.array([[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]])
    borders, longest = cu_seqlens_of(positions)
    assert borders.dtype == np.int32
    assert borders.tolist() == [0, 3, 4, 5, 7, 10]
    assert longest == 3


def test_to_keeps_all_fields() -> None:
    ids = torch.arange(4)[None]
    batch = Batch(ids, torch.tensor([[1, 2, 3, IGNORE_INDEX]]), ids, torch.tensor([0, 4], dtype=torch.int32), 4)
    moved = batch.to(torch.device("cpu"))
    assert moved.num_valid == batch.num_valid == 3
    assert moved.max_seqlen == 4
    assert torch.equal(moved.labels, batch.labels) and torch.equal(moved.cu_seqlens, batch.cu_seqlens)
