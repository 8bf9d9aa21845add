"""What the public functions refuse, and the short cut to full attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from model.moba import api, attend_blocks, choose_blocks, moba_attention
from model.moba.reference import reference_attention
from tests.model.moba.cases import NAMES, borders, make_qkv, run
from tests.tolerances import assert_close

Q, K, V = make_qkv(64, 4, 2)


def call(**change: Any) -> Tensor:
    given: dict[str, Any] = {"q": Q, "k": K, "v": V, "block_size": 16, "topk": 2, **change}
    return moba_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "q of two dimensions": ({"q": Q[0]}, r"q \[4, 16\]"),
    "v of another shape": ({"v": V[:, :1]}, r"v \[64, 1, 16\]"),
    "fewer keys than queries": ({"k": K[:32], "v": V[:32]}, "same tokens"),
    "no tokens": ({"q": Q[:0], "k": K[:0], "v": V[:0]}, "none of them 0"),
    "heads that do not divide": ({"q": Q[:, :3]}, "3 query heads, 2 kv heads"),
    "two dtypes": ({"k": K.double()}, "need one dtype"),
    "integers": ({"q": Q.int(), "k": K.int(), "v": V.int()}, "need one dtype of float16"),
    "two devices": ({"k": K.to("meta"), "v": V.to("meta")}, "need one device"),
    "block_size 0": ({"block_size": 0}, "multiple of 16, such as 16"),
    "block_size 24": ({"block_size": 24}, "multiple of 16, such as 32"),
    "topk 0": ({"topk": 0}, "topk=0"),
    "topk a float": ({"topk": 2.0}, "topk=2.0"),
    "int64 borders": ({"cu_seqlens": borders([64]).long()}, "must be int32"),
    "borders of two dimensions": ({"cu_seqlens": borders([64])[None]}, "must be int32"),
    "borders that end early": ({"cu_seqlens": borders([32, 16])}, "number of tokens, 64"),
    "borders that fall": ({"cu_seqlens": torch.tensor([0, 40, 20, 64]).int()}, "must rise"),
    "borders from 1": ({"cu_seqlens": torch.tensor([1, 64]).int()}, "must rise from 0"),
    "max_seqlen below a document": ({"cu_seqlens": borders([40, 24]), "max_seqlen": 39}, "max_seqlen=39"),
    "unknown backend": ({"backend": "fast"}, "backend=fast"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_what_is_wrong(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        call(**change)
    assert "\n" not in str(error.value)
    call()  # the same call without the change works


def empty_ids() -> Tensor:
    return torch.full((64, 4, 2), -1, dtype=torch.int32)


def set_ids(value: list[int], token: int = 40) -> Tensor:
    ids = empty_ids()
    ids[token, 0] = torch.tensor(value, dtype=torch.int32)
    return ids


@pytest.mark.parametrize(
    "make",
    [
        lambda: empty_ids().long(),
        lambda: empty_ids()[:, :2],
        lambda: empty_ids().to("meta"),
        lambda: set_ids([2, -1]),  # the own block
        lambda: set_ids([3, -1]),  # a future block
        lambda: set_ids([1, 1]),  # twice
        lambda: set_ids([-2, 0]),
        lambda: set_ids([1, -1], token=63),  # of the document before
    ],
)
def test_block_ids_that_cannot_be_attended_to(make: Callable[[], Tensor]) -> None:
    options = {"block_size": 16, "cu_seqlens": borders([48, 16])}
    with pytest.raises(UserError, match="block_ids"):
        attend_blocks(Q, K, V, make(), **options)
    attend_blocks(Q, K, V, set_ids([1, 0]), **options)


@pytest.mark.parametrize("lengths", [[64], [20, 44]], ids=str)
@pytest.mark.parametrize("backend", ["auto", "varlen", "reference"])
def test_topk_of_all_blocks_is_full_attention(lengths: list[int], backend: str) -> None:
    options = {"block_size": 16, "cu_seqlens": borders(lengths)}
    actual = run(lambda *x: moba_attention(*x, topk=4, backend=backend, **options), (Q, K, V))
    exact = run(lambda *x: reference_attention(*x, topk=4, **options), [x.double() for x in (Q, K, V)])
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert_close(x, y, name)


def test_the_short_cut_is_taken_from_the_number_of_blocks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    full = api.full_attention
    monkeypatch.setattr(api, "full_attention", lambda *x, **y: taken.append(1) or full(*x, **y))
    for topk, backend, times in ((3, "auto", 0), (4, "auto", 1), (4, "reference", 1), (99, "varlen", 2)):
        call(topk=topk, backend=backend)  # 64 tokens in blocks of 16
        assert len(taken) == times, (topk, backend)
    torch.use_deterministic_algorithms(True)
    try:
        call(topk=99)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(taken) == 2, "full attention's backward is not bit-equal on a GPU"


@pytest.mark.parametrize(
    "lengths, topk, longest, full",
    [
        ([64], 3, None, False),
        ([32, 32], 2, None, False),  # 64 tokens could be one document
        ([32, 32], 2, 32, True),
        ([32, 32], 1, 32, False),
        ([33, 31], 2, 33, False),
        ([33, 31], 3, 33, True),
        ([20, 44], 3, 60, False),
    ],
    ids=str,
)
def test_the_longest_document_decides(
    lengths: list[int], topk: int, longest: int | None, full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is covered, full attention runs and says so once; else no slot is left that nobody can fill."""
    options = {"topk": topk, "block_size": 16, "cu_seqlens": borders(lengths)}
    api._say_full.cache_clear()
    widths: list[int] = []
    with caplog.at_level("INFO", "model.moba.api"):
        for _ in range(2):
            actual = run(
                lambda *x: moba_attention(
                    *x, max_seqlen=longest, remember=lambda c, _: widths.append(c().shape[-1]) or c(), **options
                ),
                (Q, K, V),
            )
    assert len([r for r in caplog.records if "full attention runs" in r.message]) == int(full)
    most = (min(longest or 64, 64) - 1) // 16
    assert widths == ([] if full else [min(topk - 1, most)] * 2)
    exact = run(lambda *x: reference_attention(*x, **options), [x.double() for x in (Q, K, V)])
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert_close(x, y, name)


def test_backends_may_keep_documents_of_unequal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from model.dispatch import resolve_backend

    usual = resolve_backend("varlen", device="cpu", dtype=torch.float32, head_dim=16, block_size=16)
    keeps = dataclasses.replace(usual, full_when_ragged=False)
    monkeypatch.setattr(api, "resolve_backend", lambda *_, **__: keeps)
    taken: list[int] = []
    full = api.full_attention
    monkeypatch.setattr(api, "full_attention", lambda *x, **y: taken.append(1) or full(*x, **y))
    for lengths, longest, times in (([40, 24], 40, 0), ([32, 32], 32, 1), ([64], None, 2)):
        call(topk=4, cu_seqlens=borders(lengths), max_seqlen=longest)
        assert len(taken) == times, lengths


def test_choosing_and_attending_is_moba() -> None:
    options = {"block_size": 16, "cu_seqlens": borders([50, 14])}
    ids = choose_blocks(Q, K, topk=2, **options)
    assert torch.equal(attend_blocks(Q, K, V, ids, **options), moba_attention(Q, K, V, topk=2, **options))
