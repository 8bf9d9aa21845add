"""Which heads a process keeps. Generation over processes: tests/eval/test_group.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.errors import UserError
from model.parallel_generation import cache_shape, check_parallel, own_heads
from model.shapes import head_dim
from tests.model.build import tiny_config


def rank_of(size: int, rank: int) -> Any:
    return SimpleNamespace(size=size, rank=rank)


@pytest.mark.parametrize(("kv_heads", "size"), [(8, 2), (8, 8), (2, 4), (1, 8), (4, 1)])
def test_every_query_head_keeps_its_keys(kv_heads: int, size: int) -> None:
    heads, group = 8, 8 // kv_heads
    q = torch.arange(heads).view(1, heads, 1).repeat(3, 1, 2)  # each head is filled with its number
    k = torch.arange(kv_heads).view(1, kv_heads, 1).repeat(3, 1, 2)
    seen = []
    for rank in range(size):
        own_q, own_k, own_v = own_heads(rank_of(size, rank), q, k, -k)
        assert own_q.shape[1] == heads // size and own_k.shape[1] == max(1, kv_heads // size)
        assert torch.equal(own_k, -own_v)
        read = own_k.repeat_interleave(own_q.shape[1] // own_k.shape[1], 1)  # as attention does with what it gets
        assert torch.equal(own_q // group, read)
        seen += own_q[0, :, 0].tolist()
    assert seen == list(range(heads))


def test_the_cache_holds_this_ranks_heads() -> None:
    config = tiny_config("llama")
    for size in (1, 2, 4):
        shape = cache_shape(config, rank_of(size, 0))
        assert shape.num_kv_heads == max(1, config.num_kv_heads // size)
        assert head_dim(shape) == head_dim(config)
    assert cache_shape(config, None) is config


def test_models_that_cannot_be_shared_out() -> None:
    config = tiny_config("llama")
    check_parallel(config, 2)
    with pytest.raises(UserError, match="3 does not divide the model's 4 query heads"):
        check_parallel(config, 3)
    config.num_heads, config.num_kv_heads = 12, 3
    with pytest.raises(UserError, match="3 kv heads cannot be shared out"):
        check_parallel(config, 2)
    config.num_kv_heads, config.key_conv = 4, 3
    with pytest.raises(UserError, match="key convolution"):
        check_parallel(config, 2)
