"""Loss weights: from records and messages through shards and packing to the batch."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.constants import IGNORE_INDEX
from conf.errors import UserError
from conf.schema import DomainRule, ReadConfig, StageConfig, StageDataConfig, TokenizerConfig
from data.inspect import inspect
from data.loader import TrainLoader, heldout_batches
from data.prepare import prepare
from data.store import TokenStore
from data.tokenizer import load_tokenizer, train_tokenizer
from data.weights import message_weights, one_weight, token_ids, token_weights
from tests.data.build import write_store

TEXTS = [f"some words about topic {i}, with the answer {i * 7} in it" for i in range(80)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("words") / "tokenizer"
    train_tokenizer([*TEXTS, "user assistant system:\n" * 30], 320, out)
    return out


def prepared(out: Path, records: Sequence[Any], tokenizer: Path, **read: str) -> TokenStore:
    source = out.parent / f"{out.name}.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in records))
    config = ReadConfig(**read)
    prepare(out, str(source), 0.0, TokenizerConfig(path=str(tokenizer)), progress=False, read=config)
    return TokenStore(out, "train")


def by_ids(store: TokenStore) -> dict[tuple[int, ...], list[float] | None]:
    """Weights of each document, by its tokens."""
    docs = range(store.num_docs)
    losses = [store.loss(i) for i in docs]
    return {tuple(store.doc(i)): None if losses[i] is None else losses[i].tolist() for i in docs}


def test_ids_with_weights(tmp_path: Path, tokenizer: Path) -> None:
    eos = load_tokenizer(tokenizer).eos_id
    records = [
        {"input_ids": [5, 6, 7, eos], "w": [0, 1, 0.25, 2]},
        {"input_ids": [8, 9], "w": [1, 0.5]},  # without eos: it is added, and no target
        {"input_ids": [10, 11], "w": 3},
        {"input_ids": [5, 9999], "w": 1},
        {"input_ids": [5, 6], "w": [1]},  # one for all
        {"input_ids": [5, 6, 7], "w": [1, 2]},
        {"input_ids": [5, True], "w": 1},
        {"input_ids": [7, 7]},
        {"input_ids": [4, 4], "w": [0, 0]},
        {"input_ids": []},
    ]
    store = prepared(tmp_path / "set", records, tokenizer, kind="tokens", weight="w", on_error="skip")
    assert by_ids(store) == {
        (5, 6, 7, eos): [0, 1, 0.25, 2],
        (8, 9, eos): [1, 0.5, 0],
        (10, 11, eos): [3, 3, 3],
        (5, 6, eos): [1, 1, 1],
    }
    assert store.masked and store.weighted  # parts may be no targets: such documents stay whole
    assert store.manifest.skipped == {
        "a token id that the tokenizer does not have": 1,
        "weights and token ids differ in number": 1,
        "field `input_ids` is missing or no list of token ids": 1,
        "a weight is missing or no number of at least 0": 2,
        "all weights are 0": 1,
    }


def test_ids_without_weights(tmp_path: Path, tokenizer: Path) -> None:
    store = prepared(tmp_path / "set", [{"tokens": [5, 6]}], tokenizer, kind="tokens", field="tokens")
    assert by_ids(store) == {(5, 6, load_tokenizer(tokenizer).eos_id): None}
    assert not store.masked and not store.weighted
    with pytest.raises(UserError, match=r"give tokenizer\.path"):
        prepare(
            tmp_path / "x", str(tmp_path / "set.jsonl"), 0.0, TokenizerConfig(), read=ReadConfig(kind="tokens")
        )


def test_text_with_weights_may_be_cut(tmp_path: Path, tokenizer: Path) -> None:
    records = [
        {"text": TEXTS[0], "quality": 0.5},
        {"text": TEXTS[1], "quality": 2},
        {"text": "x", "quality": "no"},
    ]
    store = prepared(tmp_path / "set", records, tokenizer, weight="quality")
    assert sorted({w for weights in by_ids(store).values() for w in weights or ()}) == [0.5, 2.0]
    assert store.weighted and not store.masked and sum(store.manifest.skipped.values()) == 1
    stage = StageConfig(8, 64, 2, data=StageDataConfig(domains={"a": 1.0}, packing="concat"))
    batch = TrainLoader(stage, {"a": store}, seed=0, dp_rank=0, dp_world=1).step(0)[0]
    assert batch.weights is not None and set(batch.weights.unique().tolist()) <= {0.0, 0.5, 2.0}
    assert torch.equal(batch.weights > 0, batch.labels != IGNORE_INDEX)


def test_messages_with_weights(tmp_path: Path, tokenizer: Path) -> None:
    chat = [
        {"role": "user", "content": "topic 1"},
        {"role": "assistant", "content": "answer 7", "weight": 0},
        {"role": "user", "content": "topic 2"},
        {"role": "assistant", "content": "answer 14", "weight": 0.5},
        {"role": "user", "content": "topic 3"},
        {"role": "assistant", "content": "answer 21"},
    ]
    store = prepared(tmp_path / "set", [{"messages": chat}], tokenizer, kind="chat", weight="weight")
    words = load_tokenizer(tokenizer)
    loss = store.loss(0)
    assert loss is not None and loss.dtype == np.float32
    texts = {w: words.decode(store.doc(0)[loss == w].tolist()).strip() for w in (0.5, 1.0)}
    assert texts == {0.5: "answer 14", 1.0: "answer 21"}
    with pytest.raises(UserError, match="no usable document"):  # not read without its weights in silence
        prepared(tmp_path / "unsaid", [{"messages": chat}], tokenizer, kind="chat")


@pytest.mark.parametrize("read", [ReadConfig(weight="w"), ReadConfig(kind="tokens"), ReadConfig(kind="chat")])
def test_weights_need_records(tmp_path: Path, tokenizer: Path, read: ReadConfig) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="needs records"):
        prepare(tmp_path / "set", str(tmp_path / "a.txt"), 0.0, TokenizerConfig(str(tokenizer)), read=read)


@pytest.mark.parametrize("bad", [None, True, "1", -0.5, math.nan, math.inf])
def test_what_is_no_weight(bad: Any) -> None:
    with pytest.raises(ValueError, match="a weight is missing"):
        one_weight(bad)
    with pytest.raises(ValueError, match="a weight is missing"):
        token_weights([1.0, bad], 2)


def test_what_is_no_list_of_ids() -> None:
    for bad in (None, "12", [1, -1], [1.0], [1 << 32]):
        with pytest.raises(ValueError, match="`f` is missing"):
            token_ids(bad, "f")


def test_weights_of_other_roles_do_not_count() -> None:
    with pytest.raises(ValueError, match="all weights are 0"):
        message_weights([{"role": "user"}, {"role": "assistant", "weight": 0}], "weight")


def weighted_store(folder: Path) -> TokenStore:
    docs = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]]
    return write_store(folder, docs, heldout=docs, loss=[[0, 0, 1.5, 1], [1, 0.25, 0], [1, 1, 1, 1, 3]])


def rows_of(stage: StageConfig, stores: dict[str, TokenStore]) -> list[tuple[int, int, float]]:
    """(input, label, weight) of every labelled token of one epoch."""
    loader = TrainLoader(stage, stores, seed=0, dp_rank=0, dp_world=1, prefetch=0)
    found = []
    for batches, _ in loader:
        for batch in batches:
            weights = torch.ones(batch.labels.shape) if batch.weights is None else batch.weights
            labelled = batch.labels != IGNORE_INDEX
            assert bool((weights[~labelled] == 0).all()) or batch.weights is None
            assert batch.weight_sum == pytest.approx(float(weights[labelled].sum()))
            triples = (batch.input_ids[labelled], batch.labels[labelled], weights[labelled])
            found += list(zip(*(t.tolist() for t in triples), strict=True))
    return sorted(found)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_token_keeps_its_weight_wherever_it_lands(tmp_path: Path, factor: float) -> None:
    data = StageDataConfig(domains={"a": 1.0}, packing="best_fit", rules={"a": DomainRule(loss_weight=factor)})
    store = weighted_store(tmp_path / "set")
    rows = {length: rows_of(StageConfig(length, length * n, 1, data=data), {"a": store})
            for length, n in ((6, 3), (8, 2), (12, 1))}  # fmt: skip
    want = sorted(
        (docs[i], docs[i + 1], factor * weights[i + 1])
        for docs, weights in (
            ([1, 2, 3, 4], [0, 0, 1.5, 1]), ([5, 6, 7], [1, 0.25, 0]), ([8, 9, 10, 11, 12], [1, 1, 1, 1, 3]),
        )
        for i in range(len(docs) - 1)
        if weights[i + 1]
    )  # fmt: skip
    assert rows[12] == rows[8] == rows[6] == want


def test_domains_with_and_without_weights_share_a_batch(tmp_path: Path) -> None:
    stores = {"a": weighted_store(tmp_path / "a"), "b": write_store(tmp_path / "b", [[20, 21, 22, 23, 24]] * 4)}
    data = StageDataConfig(domains={"a": 1.0, "b": 1.0}, packing="best_fit")
    batch = TrainLoader(StageConfig(6, 24, 4, 4, data=data), stores, seed=0, dp_rank=0, dp_world=1).step(0)[0]
    assert batch.weights is not None
    plain = (batch.labels >= 20) & (batch.labels < 30)
    assert bool(plain.any()) and bool((batch.weights[plain] == 1).all())
    assert batch.to(torch.device("cpu")).weights is not None


def test_without_weights_there_is_no_tensor(tmp_path: Path) -> None:
    store = write_store(tmp_path / "b", [[20, 21, 22, 23, 24]] * 4)
    data = StageDataConfig(domains={"b": 1.0})
    batch = TrainLoader(StageConfig(6, 24, 2, data=data), {"b": store}, seed=0, dp_rank=0, dp_world=1).step(0)[0]
    assert batch.weights is None and batch.weight_sum == batch.num_valid


def test_evaluation_counts_each_target_once(tmp_path: Path) -> None:
    weighted_store(tmp_path / "set")
    batches = list(heldout_batches(TokenStore(tmp_path / "set", "heldout"), 8, 100))
    assert all(batch.weights is None for batch in batches)


def test_inspect_shows_shares_and_weights(tmp_path: Path) -> None:
    store = weighted_store(tmp_path / "set")
    data = StageDataConfig(domains={"a": 1.0}, packing="best_fit", rules={"a": DomainRule(loss_weight=2.0)})
    report = inspect(StageConfig(12, 12, 1, data=data), {"a": store}, 0, "s").domains["a"]
    assert report.targets == pytest.approx(7 / 12)
    assert report.weight == pytest.approx(2 * (1.5 + 1 + 0.25 + 1 + 1 + 1 + 3) / 7)
