import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.constants import IGNORE_INDEX
from conf.errors import UserError
from conf.schema import DomainRule, StageConfig, StageDataConfig
from data.loader import LoaderState, TrainLoader, heldout_batches, long_documents, prefetched
from data.store import TokenStore
from tests.data.build import write_store

STEPS = 12


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    folder = tmp_path_factory.mktemp("sets")
    code = [[(k * 7 + j) % 900 + 1 for j in range(k * 13 % 90 + 1)] for k in range(80)]
    books = [[(k * 5 + j) % 900 + 1 for j in range(150)] for k in range(12)]
    return {"code": write_store(folder / "code", code, books[:3]), "books": write_store(folder / "books", books)}


def make_stage(**changes: int) -> StageConfig:
    fields = {"seq_len": 32, "global_batch": 8, "micro_batch": 2, **changes}
    tokens = fields["seq_len"] * fields["global_batch"] * STEPS
    return StageConfig(tokens=tokens, data=StageDataConfig(domains={"code": 0.7, "books": 0.3}), **fields)


def make_loader(sets: dict[str, TokenStore], stage: StageConfig | None = None, **changes: int) -> TrainLoader:
    options = {"seed": 5, "dp_rank": 0, "dp_world": 1, "name": "long", **changes}
    return TrainLoader(stage or make_stage(), sets, **options)  # type: ignore[arg-type]


def global_rows(sets: dict[str, TokenStore], stage: StageConfig, world: int, step: int = 0) -> torch.Tensor:
    """[steps * global_batch, 3, S]: what all ranks together read, from `step` on."""
    steps: list[list[torch.Tensor]] = []
    for rank in range(world):
        loader = make_loader(sets, stage, dp_rank=rank, dp_world=world, start_step=step)
        mine = [[torch.stack((b.input_ids, b.labels, b.positions), 1) for b in batches] for batches, _ in loader]
        assert all(len(batches) == stage.global_batch // world // stage.micro_batch for batches in mine)
        steps = [*map(list.__add__, steps, mine)] if steps else mine
    return torch.cat([batch for step_batches in steps for batch in step_batches])


def test_a_resume_at_any_step_continues_the_same_stream(sets: dict[str, TokenStore]) -> None:
    whole = global_rows(sets, make_stage(), 1)
    assert len(whole) == STEPS * 8
    for step in range(STEPS + 1):
        rest = global_rows(sets, make_stage(), 1, step) if step < STEPS else whole[:0]
        assert torch.equal(rest, whole[step * 8 :])
    assert list(make_loader(sets, start_step=STEPS)) == []


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from([(w, m) for w in (1, 2, 4, 8) for m in (1, 2, 4, 8) if w * m <= 8]),
    step=st.integers(0, 11),
)
def test_ranks_and_micro_batches_only_share_the_work(
    sets: dict[str, TokenStore], shape: tuple[int, int], step: int
) -> None:
    world, micro = shape
    expected = global_rows(sets, make_stage(), 1)[step * 8 :]
    in_order = make_stage(micro_batch=micro)
    in_order.data.balance = False
    assert torch.equal(global_rows(sets, in_order, world, step), expected)
    dealt = global_rows(sets, make_stage(micro_batch=micro), world, step)
    assert sorted_steps(dealt, world) == sorted_steps(expected, 1)


def sorted_steps(rows: torch.Tensor, world: int) -> list[list[list[int]]]:
    """Of each step the rows, as lists, in an order of their own; `rows` as `global_rows` gives them."""
    return [sorted(step.flatten(1).tolist()) for step in rows.unflatten(0, (-1, 8))]


def test_prefetch_changes_nothing_and_state_travels_with_its_batch(sets: dict[str, TokenStore]) -> None:
    plain, ahead = make_loader(sets, prefetch=0), make_loader(sets, prefetch=3)
    for number, ((a, state_a), (b, state_b)) in enumerate(zip(plain, ahead, strict=True), 1):
        assert state_a == state_b == json.loads(json.dumps(state_a))
        assert state_a["stage_step"] == number
        assert all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(a, b, strict=True))


def test_batches_hold_the_contract(sets: dict[str, TokenStore]) -> None:
    for batches, _ in make_loader(sets):
        for batch in batches:
            assert batch.input_ids.shape == batch.labels.shape == batch.positions.shape == (2, 32)
            assert batch.cu_seqlens.dtype == torch.int32 and batch.input_ids.dtype == torch.int64
            starts = (batch.positions.flatten() == 0).nonzero().flatten()
            assert torch.equal(batch.cu_seqlens[:-1].long(), starts) and batch.cu_seqlens[-1] == 64
            assert batch.max_seqlen == int(batch.positions.max()) + 1
            inner = (batch.positions[:, 1:] > 0) & (batch.input_ids[:, 1:] > 0)  # a piece goes on; 0 pads
            assert inner.any()
            assert torch.equal(batch.labels[:, :-1][inner], batch.input_ids[:, 1:][inner])


def test_changed_data_is_refused_by_name(sets: dict[str, TokenStore], tmp_path: Path) -> None:
    state = json.loads(json.dumps(make_loader(sets).state(3)))
    make_loader(sets, make_stage(micro_batch=1), start_step=3, dp_world=2).check_state(state)

    other = write_store(tmp_path / "books", [[1, 2, 3]])
    reweighted = make_stage()
    reweighted.data.domains["books"] = 0.4
    for loader, difference in (
        (make_loader({**sets, "books": other}), "sets.books"),
        (make_loader(sets, reweighted), "weights.books was 0.3, is 0.4"),
        (make_loader(sets, make_stage(seq_len=16)), "seq_len was 32, is 16"),
        (make_loader(sets, make_stage(global_batch=16)), "global_batch was 8, is 16"),
        (make_loader(sets, seed=6), "seed was 5, is 6"),
    ):
        with pytest.raises(UserError, match=difference):
            loader.check_state(state)
    with pytest.raises(UserError, match="changed"):
        make_loader(sets).check_state({"stage_step": 3})


def test_state_does_not_grow(sets: dict[str, TokenStore]) -> None:
    sizes = {len(json.dumps(make_loader(sets).state(step))) for step in (1, 9)}
    assert len(sizes) == 1


def test_a_global_batch_that_cannot_be_shared(sets: dict[str, TokenStore]) -> None:
    with pytest.raises(UserError, match="global_batch=8 is no multiple of micro_batch=2 x 3"):
        make_loader(sets, dp_world=3)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_leaving_the_loop_stops_the_thread(sets: dict[str, TokenStore]) -> None:
    steps = iter(make_loader(sets, prefetch=1))
    next(steps)
    assert prefetch_threads()
    steps.close()  # type: ignore[attr-defined]
    assert not prefetch_threads()


def test_the_thread_is_never_more_than_its_depth_ahead() -> None:
    made: list[int] = []
    for number in prefetched(lambda t: made.append(t) or t, range(40), depth=3):  # type: ignore[func-returns-value]
        assert len(made) <= number + 1 + 3 + 1  # given out, waiting in the queue, one in the hand


def test_an_error_arrives_at_its_place() -> None:
    def make(t: int) -> int:
        if t == 2:
            raise OSError("disk gone")
        return t

    got: list[int] = []
    with pytest.raises(OSError, match="disk gone"):
        got.extend(iter(prefetched(make, range(5), 2)))
    assert not prefetch_threads()


def test_heldout_batches_cover_the_split_once(sets: dict[str, TokenStore]) -> None:
    store = TokenStore(sets["code"].path, "heldout")
    batches = list(heldout_batches(store, 32, 10**9, rows_per_batch=4))
    assert sum(batch.num_valid for batch in batches) == store.num_tokens - store.num_docs
    short = list(heldout_batches(store, 32, 65, rows_per_batch=4))
    assert [len(batch.input_ids) for batch in short] == [3]
    assert torch.equal(short[0].input_ids, batches[0].input_ids[:3])


def test_long_documents_are_whole_prefixes(tmp_path: Path) -> None:
    store = write_store(
        tmp_path / "a", [[k] * 3 + list(range(length - 3)) for k, length in enumerate((9, 10, 11, 30))]
    )
    batches = list(long_documents(store, 9, 10**9))
    assert sorted(int(batch.input_ids[0, 0]) for batch in batches) == [1, 2, 3]  # 9 tokens have only 8 targets
    for batch in batches:
        assert batch.cu_seqlens.tolist() == [0, 9] and batch.max_seqlen == 9
        assert IGNORE_INDEX not in batch.labels
        assert torch.equal(batch.labels[0, :-1], batch.input_ids[0, 1:])
    assert len(list(long_documents(store, 9, 10))) == 2
    assert list(long_documents(store, 30, 100)) == []


def test_state_type_is_plain(sets: dict[str, TokenStore]) -> None:
    state: LoaderState = make_loader(sets).state(1)
    assert set(state) == {"stage_step", "fingerprint", "identity"}


def test_documents_left_out_are_told_once(sets: dict[str, TokenStore], caplog: pytest.LogCaptureFixture) -> None:
    stage = make_stage()
    stage.data.packing = "best_fit"
    stage.data.rules = {"books": DomainRule(min_length=10), "code": DomainRule(long="drop", upsample={20: 3})}
    for options in ({"start_step": 1}, {"dp_rank": 1, "dp_world": 2}):
        make_loader(sets, stage, **options)
    assert not caplog.messages
    make_loader(sets, stage)
    long = sum(sets["code"].doc_length(i) > 32 for i in range(80))
    told = f"long: {long} of the 80 documents of code are left out by its rule or as longer than seq_len=32"
    assert caplog.messages == [told]
