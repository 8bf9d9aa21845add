import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.schema import StageConfig, StageDataConfig
from data.packing import best_fit
from data.source import Mixture, StageSource
from tests.data.build import write_store

WEIGHTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.floats(0.01, 100), min_size=1, max_size=7
)


@settings(deadline=None, max_examples=80)
@given(weights=WEIGHTS)
def test_mixture_counts_are_exact_and_shares_hold_at_every_sample(weights: dict[str, float]) -> None:
    mixture, seen = Mixture(weights), Counter[str]()
    total, bound = sum(weights.values()), 1 + math.log(len(weights)) + 1e-3
    for i in range(400):
        name, number = mixture.locate(i)
        assert number == seen[name]
        seen[name] += 1
        for domain, weight in weights.items():
            assert abs(seen[domain] - (i + 1) * weight / total) <= bound


def test_mixture_at_a_far_sample_costs_no_more() -> None:
    name, number = Mixture({"a": 3, "b": 1}).locate(10**15)
    assert abs(number - 10**15 * {"a": 0.75, "b": 0.25}[name]) <= 2


def make_stage(**domains: float) -> StageConfig:
    return StageConfig(seq_len=8, tokens=8 * 4 * 30, global_batch=4, data=StageDataConfig(domains=domains))


def test_each_epoch_visits_each_row_once_in_another_order(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", [[k] * (k % 11 + 1) for k in range(1, 60)])
    source = StageSource(make_stage(a=1.0), {"a": store}, seed=0, name="s")
    rows = -(-store.num_tokens // 8)
    epochs = [[source.locate(e * rows + i) for i in range(rows)] for e in range(2)]
    for number, epoch in enumerate(epochs):
        assert {place.epoch for place in epoch} == {number}
        assert sorted(place.row for place in epoch) == list(range(rows))
    assert [p.row for p in epochs[0]] != [p.row for p in epochs[1]]
    for number in range(2):  # and with it every token of the set
        tokens = Counter(t for i in range(rows) for t in source.row(number * rows + i).input_ids.tolist())
        del tokens[0]  # padding
        assert tokens == Counter(t for i in range(store.num_docs) for t in store.doc(i).tolist())


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    weight=st.floats(0.1, 10),
    rows=st.integers(2, 60),
    longer=st.integers(0, 200),
)
def test_best_fit_gives_every_epoch_all_documents_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], weight: float, rows: int, longer: int
) -> None:
    """Whatever the lengths, the share of the domain and how often its documents come round."""
    docs = [[k + 1] * length for k, length in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("sets")
    sets = {"a": write_store(folder / "a", docs), "b": write_store(folder / "b", [[99] * 8] * 3)}
    stage = StageConfig(8, 8 * rows, 1, data=StageDataConfig({"a": weight, "b": 1.0}, packing="best_fit"))
    source = StageSource(stage, sets, 0, "s")
    tokens: dict[int, Counter[int]] = {}
    seen: set[tuple[int, int]] = set()
    for i in range(rows):
        place = source.locate(i)
        if place.domain == "a":
            assert (place.epoch, place.row) not in seen
            seen.add((place.epoch, place.row))
            _, pieces = source.pieces(i)
            for doc, size in zip(pieces.doc.tolist(), pieces.size.tolist(), strict=True):
                tokens.setdefault(place.epoch, Counter())[doc] += size
    assert sorted(tokens) == list(range(len(tokens)))  # epochs come in turn,
    everything = Counter(dict(enumerate(np.diff(sets["a"].offsets).tolist())))
    for epoch in sorted(tokens)[:-1]:  # and all but the last are whole
        assert tokens[epoch] == everything
    stage.tokens += 8 * longer  # a longer stage begins like a shorter one: plans are only added
    longer_source = StageSource(stage, sets, 0, "s")
    assert [longer_source.locate(i) for i in range(rows)] == [source.locate(i) for i in range(rows)]


def test_a_packing_is_the_same_everywhere(tmp_path: Path) -> None:
    """Frozen: what a resume on another machine or another version of numpy must find."""
    lengths = np.array([3, 9, 4, 1, 7, 2, 5, 6, 8, 2])
    plan = best_fit(lengths, 8, 100, epoch=1)
    assert {name: values.tolist() for name, values in plan.items()} == {
        "row_starts": [0, 1, 2, 4, 7, 9, 11],
        "doc": [1, 8, 4, 1, 2, 9, 5, 6, 0, 3, 7],
        "skip": [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0],
        "size": [8, 8, 7, 1, 4, 2, 2, 5, 3, 1, 6],
    }


def test_stages_and_seeds_see_different_orders(tmp_path: Path) -> None:
    sets = {"a": write_store(tmp_path / "a", [[k] * 8 for k in range(1, 60)])}

    def order(seed: int, name: str) -> list[int]:
        source = StageSource(make_stage(a=1.0), sets, seed, name)
        return [source.locate(i).row for i in range(50)]

    assert order(0, "s") == order(0, "s")
    assert order(0, "s") != order(1, "s") and order(0, "s") != order(0, "t")


@pytest.mark.parametrize(
    ("domains", "names"),
    [({}, "domains"), ({"b": 1.0}, "domains.b"), ({"a": 0.0}, "domains.a"), ({"a": float("inf")}, "domains.a")],
)
def test_bad_domains_are_named(tmp_path: Path, domains: dict[str, float], names: str) -> None:
    sets = {"a": write_store(tmp_path / "a", [[1, 2]])}
    with pytest.raises(UserError, match=names):
        StageSource(make_stage(**domains), sets, 0, "s")


def test_unknown_packing(tmp_path: Path) -> None:
    stage = make_stage(a=1.0)
    stage.data.packing = "magic"
    with pytest.raises(UserError, match=r"data\.packing=magic"):
        StageSource(stage, {"a": write_store(tmp_path / "a", [[1, 2]])}, 0, "s")


def test_sets_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    sets = {name: write_store(tmp_path / name, [[1, 2]]) for name in "ab"}
    sets["b"].tokenizer_fingerprint = "another"
    with pytest.raises(UserError, match="different tokenizers"):
        StageSource(make_stage(a=1.0, b=1.0), sets, 0, "s")
