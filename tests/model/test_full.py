import pytest
import torch
from torch import Tensor

from model.full import full_attention
from tests.model.moba.cases import NAMES, borders, make_qkv, run
from tests.tolerances import assert_close


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Masked softmax over all tokens."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (doc[:, None] == doc) & torch.ones(len(doc), len(doc), dtype=torch.bool).tril()
    score = torch.einsum("thd,shd->hts", q, k) * scale
    return torch.einsum("hts,shd->thd", score.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("lengths", [[40], [20, 20], [1, 30, 9], [0, 25, 15, 0]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 1)])
def test_equals_a_dense_mask(lengths: list[int], heads: int, kv_heads: int) -> None:
    qkv = make_qkv(40, heads, kv_heads)
    exact = run(lambda *x: dense(*x, lengths, 0.25), [x.double() for x in qkv])
    for longest in (max(lengths), 40, 1000):
        actual = run(lambda *x: full_attention(*x, cu_seqlens=borders(lengths), max_seqlen=longest), qkv)  # noqa: B023
        for name, x, y in zip(NAMES, actual, exact, strict=True):
            assert_close(x, y, f"{name} {longest}")


def test_softmax_scale_and_host_borders() -> None:
    lengths = [7, 33]
    q, k, v = make_qkv(40, 4, 2, dtype=torch.float64)
    wrong_on_purpose = borders([40, 0])  # equal results show that the host copy was read instead
    out = full_attention(
        q, k, v, cu_seqlens=wrong_on_purpose, max_seqlen=33, softmax_scale=0.6, cu_seqlens_host=[0, 7, 40]
    )
    assert_close(out, dense(q, k, v, lengths, 0.6), "out")


def test_a_longest_document_that_cannot_be() -> None:
    q, k, v = make_qkv(40, 2, 2)
    with pytest.raises(ValueError, match="max_seqlen=19"):
        full_attention(q, k, v, cu_seqlens=borders([20, 20]), max_seqlen=19)
