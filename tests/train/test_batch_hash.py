"""`metrics.batch_hash` over real process groups: equal however ranks share the batch."""

from types import SimpleNamespace
from typing import Any

import torch

from tests.gloo import GlooPool

ROWS = torch.arange(8 * 5).reshape(8, 5) * 7919


def hash_of(rows_of_ranks: list[list[int]], enabled: bool = True) -> dict[str, Any]:
    """The row of this rank's step; every rank has the rows listed for it, one to a micro-batch."""
    from data.batch import Batch
    from train.loop import hash_of_step

    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    ids = [ROWS[row : row + 1] for row in rows_of_ranks[rank]]
    batches = [Batch(one, one, one, torch.tensor([0, 5]), 5) for one in ids]
    config = SimpleNamespace(metrics=SimpleNamespace(batch_hash=enabled))
    run: Any = SimpleNamespace(config=config, mesh=SimpleNamespace(sp_rank=0, device=torch.device("cpu")))
    return dict(hash_of_step(run, batches))


def test_the_hash_of_a_step_does_not_depend_on_ranks() -> None:
    one, two = GlooPool(1), GlooPool(2)
    try:
        (whole,) = one(hash_of, [list(range(8))])
        assert len(whole["batch_hash"]) == 16
        for shared in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[7, 0, 2, 5], [1, 6, 4, 3]]):
            assert two(hash_of, shared) == [whole, whole]
        assert two(hash_of, [[0, 1, 2, 3], [4, 5, 6, 6]])[0] != whole
        assert two(hash_of, [[0], [1]], False) == [{}, {}]
    finally:
        one.close()
        two.close()
