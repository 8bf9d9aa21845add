import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.moba import attend_blocks, choose_blocks, moba_attention, varlen
from model.moba.blocks import build_block_table
from model.moba.reference import reference_attend, reference_attention
from tests.model.moba.cases import NAMES, borders, make_qkv, run
from tests.tolerances import assert_close


def compare(
    lengths: list[int], heads: int, kv_heads: int, size: int, topk: int, dtype: torch.dtype = torch.float32
) -> None:
    """moba_attention against the float64 oracle: out, dq, dk, dv."""
    options = {"block_size": size, "topk": topk, "cu_seqlens": borders(lengths)}
    qkv = make_qkv(sum(lengths), heads, kv_heads, seed=len(lengths) + topk, dtype=dtype)
    actual = run(lambda q, k, v: moba_attention(q, k, v, backend="varlen", **options), qkv)
    exact = run(lambda q, k, v: reference_attention(q, k, v, **options), [x.double() for x in qkv])
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert x.dtype == dtype
        assert_close(x, y, f"{name} {lengths} {heads}/{kv_heads} block {size} topk {topk}")


def ragged(size: int) -> list[int]:
    return [1, size - 1, size, size + 1, 3 * size + 5, 2, 4 * size]


@pytest.mark.parametrize("size", [16, 32, 48, 128])
@pytest.mark.parametrize("topk", [1, 2, 3, 100])
def test_equals_the_oracle_on_ragged_documents(size: int, topk: int) -> None:
    compare(ragged(size), 4, 2, size, topk)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_equals_the_oracle_for_grouped_heads(group: int) -> None:
    compare(ragged(16), 8, 8 // group, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_oracle_in_other_dtypes(dtype: torch.dtype) -> None:
    compare(ragged(16), 4, 2, 16, 3, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(any),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 3)]),
    size=st.sampled_from([16, 32, 48]),
    topk=st.integers(1, 7),
)
def test_equals_the_oracle_on_any_packing(
    lengths: list[int], heads: tuple[int, int], size: int, topk: int
) -> None:
    compare(lengths, *heads, size, topk)


def test_gradients_by_finite_differences() -> None:
    lengths = [17, 40]
    qkv = [x.requires_grad_() for x in make_qkv(57, 2, 1, 3, dtype=torch.float64)]
    options = {"block_size": 16, "cu_seqlens": borders(lengths)}
    ids = choose_blocks(qkv[0], qkv[1], topk=2, **options)
    assert (ids >= 0).any()
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend_blocks(q, k, v, ids, backend="varlen", **options), qkv, fast_mode=True
    )


def test_packed_documents_equal_separate_ones_in_any_order() -> None:
    lengths = [70, 16, 1, 45]
    qkv = make_qkv(sum(lengths), 4, 2, dtype=torch.float64)
    options = {"block_size": 16, "topk": 2, "backend": "varlen"}
    packed = run(lambda *x: moba_attention(*x, cu_seqlens=borders(lengths), **options), qkv)
    pieces = [x.split(lengths) for x in qkv]

    def separately(*x: Tensor) -> Tensor:
        return torch.cat([moba_attention(*d, **options) for d in zip(*(t.split(lengths) for t in x), strict=True)])

    order = [2, 0, 3, 1]
    shuffled = moba_attention(
        *(torch.cat([p[i] for i in order]) for p in pieces),
        cu_seqlens=borders([lengths[i] for i in order]),
        **options,
    )
    for name, x, y in zip(NAMES, packed, run(separately, qkv), strict=True):
        assert_close(x, y, name)
    assert_close(shuffled, torch.cat([packed[0].split(lengths)[i] for i in order]), "shuffled")


def test_topk_1_is_attention_within_blocks() -> None:
    qkv = make_qkv(64, 2, 1, dtype=torch.float64)
    within = run(lambda *x: moba_attention(*x, block_size=16, topk=1, backend="varlen"), qkv)
    cut = run(lambda *x: moba_attention(*x, block_size=64, topk=1, cu_seqlens=borders([16] * 4)), qkv)
    for name, x, y in zip(NAMES, within, cut, strict=True):
        assert_close(x, y, name)


def test_every_past_block_listed_is_full_attention() -> None:
    """Through the block path: the short cut of `moba_attention` is not taken here."""
    qkv = make_qkv(100, 2, 1, dtype=torch.float64)
    ids = choose_blocks(*qkv[:2], block_size=16, topk=50)
    blocks = run(lambda *x: attend_blocks(*x, ids, block_size=16, backend="varlen"), qkv)
    full = run(lambda *x: moba_attention(*x, block_size=112, topk=1, backend="reference"), qkv)
    for name, x, y in zip(NAMES, blocks, full, strict=True):
        assert_close(x, y, name)


def test_the_future_reaches_neither_outputs_nor_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(150, 2, 1))
    out = moba_attention(q, k, v, block_size=16, topk=3, backend="varlen")
    out[:75].sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and not x.grad[75:].any() and x.grad[:75].any()
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[75:] = 5 * torch.randn_like(x[75:])
    after = moba_attention(*changed, block_size=16, topk=3, backend="varlen")
    assert_close(after[:75], out[:75], "past outputs", 1e-6)


@pytest.mark.parametrize("pattern", ["all on block 0", "nobody", "holes"])
def test_unusual_choices(pattern: str) -> None:
    q, k, v = make_qkv(120, 4, 2)
    ids = torch.full((120, 4, 3), -1, dtype=torch.int32)
    if pattern == "all on block 0":
        ids[16:, :, 1] = 0
    if pattern == "holes":  # some heads only, the last block reads in reverse, block 3 by nobody
        ids[64:, ::2, 0] = 2
        ids[112:, :, 2] = 1
        ids[112:, 1, 0] = 4
    actual = run(lambda *x: attend_blocks(*x, ids, block_size=16, backend="varlen"), (q, k, v))
    exact = run(lambda *x: reference_attend(*x, ids, block_size=16)[0], [x.double() for x in (q, k, v)])
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert_close(x, y, name)


def test_any_workspace_gives_the_same() -> None:
    lengths = ragged(16)
    qkv = make_qkv(sum(lengths), 4, 2, dtype=torch.float64)
    table = build_block_table(borders(lengths), sum(lengths), 16)
    ids = choose_blocks(*qkv[:2], block_size=16, topk=3, cu_seqlens=borders(lengths))

    def at(workspace: int, tile_bytes: int) -> tuple[Tensor, ...]:
        return run(
            lambda q, k, v: varlen.attend(q, k, v, ids, table, 0.25, workspace=workspace, tile_bytes=tile_bytes),
            qkv,
        )

    whole = at(1 << 30, 1 << 30)
    for workspace, tile_bytes in ((1, 1), (50_000, 1 << 30), (1 << 30, 40_000)):
        for name, x, y in zip(NAMES, at(workspace, tile_bytes), whole, strict=True):
            assert_close(x, y, f"{name} {workspace} {tile_bytes}")


def test_uninitialised_memory_is_never_read(nan_memory: None) -> None:
    assert torch.empty(8).isnan().all()
    compare(ragged(16), 4, 2, 16, 3)


def test_same_bits_every_time() -> None:
    qkv = make_qkv(300, 4, 2)
    first, second = (
        run(lambda *x: moba_attention(*x, block_size=32, topk=3, backend="varlen"), qkv) for _ in "ab"
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_softmax_scale_and_strided_inputs() -> None:
    packed = torch.randn(80, 4, 3, 16, dtype=torch.float64)
    qkv = [packed[:, :, i] for i in range(3)]
    options = {"block_size": 16, "topk": 2, "softmax_scale": 0.7}
    actual = moba_attention(*qkv, backend="varlen", **options)
    assert_close(actual, reference_attention(*(x.contiguous() for x in qkv), **options), "out")
