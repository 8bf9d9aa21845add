"""Which kernels run the routed passes. Whether both compute the same: test_gluon_gpu.py."""

import pytest

pytest.importorskip("triton")
from model.moba import hopper


@pytest.fixture
def usable(monkeypatch):
    monkeypatch.setattr(hopper, "_unusable", lambda: None)


def test_specialised_kernels_where_they_were_measured(usable):
    assert hopper.refusal(128, 256) is None and hopper.refusal(128, 4096) is None
    assert hopper.explain(128, 4096) == "warp-specialised kernels for Hopper"


@pytest.mark.parametrize(
    ("head_dim", "block_size", "why"),
    [(64, 512, "head_dim 64"), (128, 128, "block_size 128"), (128, 1040, "block_size 1040")],
)
def test_the_twins_elsewhere_and_why(usable, head_dim, block_size, why):
    assert why in str(hopper.refusal(head_dim, block_size))
    assert hopper.explain(head_dim, block_size).startswith("Triton kernels: ")


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
        assert hopper.refusal(128, 512) == "switched off"
    assert hopper.refusal(128, 512) is None
