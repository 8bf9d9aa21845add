"""Any mixture, killed anywhere, resumed on any number of ranks: the same tokens, step by step."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conf.constants import IGNORE_INDEX
from conf.errors import UserError
from conf.schema import DomainRule, StageConfig, StageDataConfig
from data.batch import Batch
from data.batch_hash import rows_hash
from data.loader import TrainLoader
from data.source import StageSource
from data.store import TokenStore
from tests.data.build import write_store

STEPS, GLOBAL_BATCH = 6, 8


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    folder = tmp_path_factory.mktemp("sets")
    short = [[(k * 7 + j) % 900 + 1 for j in range(k * 13 % 40 + 1)] for k in range(60)]
    long = [[(k * 5 + j) % 900 + 1 for j in range(90 + k)] for k in range(9)]
    chats = [[(k * 3 + j) % 900 + 1 for j in range(k % 29 + 4)] for k in range(30)]
    loss = [[int(j > len(one) // 2) for j in range(len(one))] for one in chats]
    return {
        "short": write_store(folder / "short", short),
        "long": write_store(folder / "long", long),
        "chats": write_store(folder / "chats", chats, loss=loss),
    }


RULES = st.builds(
    DomainRule,
    min_length=st.sampled_from([0, 0, 3, 9]),
    max_length=st.sampled_from([0, 0, 95]),
    long=st.sampled_from(["auto", "split", "truncate"]),
    upsample=st.sampled_from([{}, {5: 2.0}, {1: 0.75, 92: 2.5}]),
    loss_weight=st.sampled_from([1.0, 1.0, 0.25]),
)
SHAPES = st.sampled_from([(w, m) for w in (1, 2, 4) for m in (1, 2, 4) if w * m <= GLOBAL_BATCH])


@st.composite
def stages(draw: st.DrawFn) -> StageConfig:
    names = draw(st.lists(st.sampled_from(["short", "long", "chats"]), min_size=1, unique=True))
    rules = {name: draw(RULES) for name in names if name != "chats" and draw(st.booleans())}
    packing = "best_fit" if "chats" in names else draw(st.sampled_from(["concat", "best_fit"]))
    seq_len = draw(st.sampled_from([16, 33]))
    data = StageDataConfig(
        domains={name: draw(st.floats(0.1, 5)) for name in names},
        rules=rules,
        packing=packing,
        window=draw(st.sampled_from([4, 1000])),
    )
    return StageConfig(
        seq_len=seq_len, tokens=seq_len * GLOBAL_BATCH * STEPS, global_batch=GLOBAL_BATCH, data=data
    )


def weights_of(batch: Batch) -> Tensor:
    return (batch.labels != IGNORE_INDEX).float() if batch.weights is None else batch.weights


def stream(
    sets: dict[str, TokenStore], stage: StageConfig, shape: tuple[int, int], seed: int, start: int, depth: int
) -> tuple[list[int], list[Counter[tuple[int, ...]]], list[dict[str, object]]]:
    """Per step from `start`: hash over all ranks, rows (ids, labels, positions, weights) as a multiset, rank 0's
    state."""
    world, stage.micro_batch = shape
    loaders = [
        TrainLoader(stage, sets, seed=seed, dp_rank=r, dp_world=world, start_step=start, name="s", prefetch=depth)
        for r in range(world)
    ]
    hashes, rows, states = [], [], []
    for parts in zip(*loaders, strict=True):
        batches = [batch for own, _ in parts for batch in own]
        hashes.append(sum(rows_hash(own) for own, _ in parts) % 2**64)
        fields = [(b.input_ids, b.labels, b.positions, weights_of(b)) for b in batches]
        tensors = [t for one in fields for t in zip(*one, strict=True)]
        rows.append(Counter(tuple(value for t in row for value in t.tolist()) for row in tensors))
        states.append(parts[0][1])
    return hashes, rows, states


@settings(deadline=None, max_examples=40)
@given(
    stage=stages(), seed=st.integers(0, 99), first=SHAPES, then=SHAPES, kill=st.integers(0, STEPS - 1),
    depth=st.sampled_from([0, 2]),
)  # fmt: skip
def test_killed_anywhere_resumed_anywhere(
    sets: dict[str, TokenStore],
    stage: StageConfig,
    seed: int,
    first: tuple[int, int],
    then: tuple[int, int],
    kill: int,
    depth: int,
) -> None:
    try:
        hashes, rows, states = stream(sets, stage, first, seed, 0, 0)
    except UserError as error:
        assert "leaves none" in str(error)
        return
    assert len(hashes) == STEPS
    resumed = stream(sets, stage, then, seed, kill, depth)
    assert resumed[0] == hashes[kill:] and resumed[1] == rows[kill:] and resumed[2] == states[kill:]
    TrainLoader(stage, sets, seed=seed, dp_rank=0, dp_world=1, name="s").check_state(states[kill])  # type: ignore[arg-type]


def test_sets_may_be_shared_and_what_changed_is_named(sets: dict[str, TokenStore]) -> None:
    """The same set as two domains, the long documents apart, as in ProLong's mix."""
    data = StageDataConfig(
        domains={"whole": 0.6, "all": 0.4},
        rules={"whole": DomainRule(set="long", min_length=93), "all": DomainRule(set="long")},
        packing="best_fit",
    )
    stage = StageConfig(seq_len=64, tokens=64 * 8 * 4, global_batch=8, data=data)
    both = {"whole": sets["long"], "all": sets["long"]}
    loader = TrainLoader(stage, both, seed=0, dp_rank=0, dp_world=1)
    state = loader.state(1)
    source = StageSource(stage, both, 0, "s")
    counts = Counter(source.pieces(i)[0] for i in range(100))
    assert counts == {"whole": 60, "all": 40}
    assert source.documents["whole"].num_docs == 6
    data.rules["whole"].min_length = 94
    with pytest.raises(UserError, match=r"rules\.whole\.min_length was 93, is 94"):
        TrainLoader(stage, both, seed=0, dp_rank=0, dp_world=1).check_state(state)


def test_answers_are_never_cut(sets: dict[str, TokenStore]) -> None:
    data = StageDataConfig(domains={"chats": 1.0}, packing="best_fit")
    stage = StageConfig(seq_len=24, tokens=24 * 8 * 4, global_batch=8, data=data)
    source = StageSource(stage, sets, 0, "s")
    lengths = [len(sets["chats"].doc(i)) for i in range(30)]
    assert source.documents["chats"].num_docs == sum(n <= 24 for n in lengths) < 30
    for i in range(source.packed["chats"].rows_of(0)):
        assert not source.pieces(i)[1].skip.any()
    for packing, long, message in (
        ("concat", "auto", "packing=concat would cut answers"),
        ("best_fit", "truncate", "long=truncate would train on cut answers"),
        ("best_fit", "error", "longer than seq_len=24"),
    ):
        data.packing, data.rules = packing, {"chats": DomainRule(long=long)}
        with pytest.raises(UserError, match=message):
            StageSource(stage, sets, 0, "s")
