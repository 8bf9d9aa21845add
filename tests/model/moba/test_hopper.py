"""Which kernels run the passes over lists. Whether both compute the same: test_gluon_gpu.py."""

import pytest

pytest.importorskip("triton")
from model.moba import hopper, passes, triton_reach
from model.moba.blocks import build_block_table
from tests.model.moba.cases import borders

PASSES = ("routed", "dq", "dkv", "combine", "merge")


@pytest.fixture
def usable(monkeypatch):
    monkeypatch.setattr(hopper, "_unusable", lambda: None)


def _specialised(head_dim, block_size):
    return tuple(which for which in PASSES if hopper.refusal(head_dim, block_size, which) is None)


def test_specialised_kernels_where_they_were_measured_to_win(usable):
    assert _specialised(128, 1024) == _specialised(128, 4096) == PASSES
    assert _specialised(128, 256) == _specialised(128, 896) == PASSES
    assert _specialised(128, 128) == ("combine",)
    assert hopper.refusal(128, 128, "fused") is hopper.refusal(64, 128, "fused") is None
    assert "routed, dq, dkv" not in hopper.explain(128, 128) and "fused, combine; " in hopper.explain(128, 128)
    assert hopper.refusal(256, 128, "fused") == "head_dim 256"
    assert _specialised(64, 512) == ("dkv", "combine", "merge")
    assert _specialised(64, 128) == ("combine", "merge")
    assert hopper.explain(128, 4096) == "warp-specialised: routed, dq, dkv, combine, merge; Triton: none"
    assert _specialised(64, 1024) == ("dkv",)
    assert "merge: blocks of 1024 are above 512 at head_dim 64" in hopper.explain(64, 1024)


def test_long_runs_without_lists_at_head_dim_64_are_the_twins():
    table = build_block_table(borders([8192]), 8192, 512)
    assert triton_reach.build_reach(table, 0).many is False
    reach = triton_reach.build_reach(table, 7)
    assert reach.many and passes._long_runs(64, reach) and not passes._long_runs(128, reach)


@pytest.mark.parametrize("block_size", [64, 1040])
def test_the_twins_elsewhere_and_why(usable, block_size):
    assert _specialised(128, block_size) == _specialised(64, block_size) == ()
    assert f"blocks of {block_size} are" in hopper.explain(128, block_size)
    assert hopper.refusal(128, block_size, "fused") == f"blocks of {block_size} are not of 128"


@pytest.mark.parametrize(("version", "runs"), [("3.6.0", True), ("3.7.1", False), ("3.60.0", False)])
def test_only_the_measured_version_of_triton(monkeypatch, version, runs):
    monkeypatch.setattr(hopper.triton_common, "INTERPRETED", False)
    monkeypatch.setattr(hopper.triton, "__version__", version)
    why = hopper._unusable.__wrapped__()
    assert why is None if runs else version in why


def test_not_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(hopper.triton_common, "INTERPRETED", True)
    assert "interpreter" in hopper._unusable.__wrapped__()


def test_the_twins_alone_inside_the_context_only(usable):
    with hopper.twins_only():
        with hopper.twins_only():
            pass
        assert _specialised(128, 512) == ()
    assert _specialised(128, 2048) == PASSES


def test_what_runs_is_said_once(usable, caplog):
    hopper._say.cache_clear()
    with caplog.at_level("INFO"):
        for which in PASSES * 2:
            hopper.specialised(128, 1152, which)
    assert [r.getMessage() for r in caplog.records] == [
        "MoBA kernels, head_dim 128, blocks of 1152: warp-specialised: "
        "routed, dq, dkv, combine, merge; Triton: none"
    ]
