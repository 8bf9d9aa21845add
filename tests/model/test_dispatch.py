import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from conf.errors import UserError
from model import dispatch
from model.dispatch import Backend, resolve_backend

CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "block_size": 64}
CUDA: dict[str, Any] = {"device": "cuda:0", "dtype": torch.bfloat16, "head_dim": 128, "block_size": 512}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Choices are kept for the life of a process."""
    dispatch._resolve.cache_clear()
    yield
    dispatch._resolve.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a made-up backend in the place of `triton`."""

    def put(**abilities: Any) -> Backend:
        module = ModuleType("made_up_kernels")
        given: dict[str, Any] = {
            "name": "triton",
            "device_types": ("cuda",),
            "dtypes": (torch.bfloat16,),
            "choose": None,
            "attend": None,
            **abilities,
        }
        module.BACKEND = Backend(**given)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_up_kernels", module)
        monkeypatch.setitem(dispatch._MODULES, "triton", "made_up_kernels")
        return module.BACKEND

    return put


def test_auto_on_a_cpu_is_varlen_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "model.dispatch"):
        names = {resolve_backend("auto", **CPU).name for _ in range(3)}
    assert names == {"varlen"}
    assert [r.message for r in caplog.records if "varlen" in r.message and "triton" in r.message] == [
        caplog.records[0].message
    ]
    assert len(caplog.records) == 1


def test_auto_takes_the_kernels_where_they_fit(kernels: Any) -> None:
    backend = kernels(head_dims=(64, 128))
    assert resolve_backend("auto", **CUDA) is backend
    assert resolve_backend("auto", **{**CUDA, "head_dim": 96}).name == "varlen"
    assert resolve_backend("auto", **{**CUDA, "dtype": torch.float32}).name == "varlen"
    assert resolve_backend("auto", **CPU).name == "varlen"


@pytest.mark.parametrize("name", ["varlen", "reference"])
def test_a_named_backend_is_the_one_that_runs(name: str, kernels: Any) -> None:
    kernels()
    assert resolve_backend(name, **CUDA).name == resolve_backend(name, **CPU).name == name


@pytest.mark.parametrize(
    ("abilities", "reason"),
    [
        ({"device_types": ("xpu",)}, "runs on xpu, not on cuda"),
        ({"dtypes": (torch.float16,)}, "takes float16, not bfloat16"),
        ({"head_dims": (64,)}, "takes head_dim 64, not 128"),
        ({"block_size_multiple": 1024}, "multiple of 1024, not 512"),
        ({"max_block_size": 256}, "up to 256, not 512"),
        ({"missing": lambda: "needs a newer GPU"}, "needs a newer GPU"),
    ],
)
def test_an_impossible_request_names_one_that_works(kernels: Any, abilities: dict[str, Any], reason: str) -> None:
    kernels(**abilities)
    with pytest.raises(UserError, match=reason) as error:
        resolve_backend("triton", **CUDA)
    assert "attention.backend=varlen works here" in str(error.value) and "\n" not in str(error.value)


def test_a_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._MODULES, "triton", "no_such_module_here")
    with pytest.raises(UserError, match="cannot be imported here"):
        resolve_backend("triton", **CUDA)
    assert resolve_backend("auto", **CUDA).name == "varlen"


def test_unknown_name_and_impossible_dtype() -> None:
    with pytest.raises(UserError, match="fast: unknown; use one of auto, triton, varlen, reference"):
        resolve_backend("fast", **CPU)
    with pytest.raises(UserError, match=r"takes float64, .* not int32; no other backend can do it either"):
        resolve_backend("varlen", **{**CPU, "dtype": torch.int32})
    with pytest.raises(UserError, match="backend=auto: no backend for cpu, int32"):
        resolve_backend("auto", **{**CPU, "dtype": torch.int32})


def test_every_listed_backend_declares_itself() -> None:
    for name in ("varlen", "reference"):
        assert resolve_backend(name, **CPU).name == name
