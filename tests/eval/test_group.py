"""Evaluation shared out over processes: the numbers of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.compose import compose
from conf.errors import UserError
from eval.run import prepare, run
from launch.cli import main
from tests.eval import group_jobs as jobs
from tests.eval.build import Small, build
from tests.gloo import GlooPool


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    pool = GlooPool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize(("num_kv_heads", "size"), [(2, 2), (4, 4), (1, 4), (2, 4)])
def test_same_tokens_and_losses_as_one_process(pool: GlooPool, num_kv_heads: int, size: int) -> None:
    """Prompts of unequal length, one of them shorter than the group is large; fewer kv heads than processes."""
    _same_as_alone(pool, num_kv_heads, size)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_same_tokens_and_losses_on_gpus(gpu_pools: dict[int, GlooPool], num_kv_heads: int) -> None:
    _same_as_alone(gpu_pools[2], num_kv_heads, 2)


def _same_as_alone(pool: GlooPool, num_kv_heads: int, size: int) -> None:
    expected = jobs.alone(num_kv_heads)
    found = pool(jobs.together, num_kv_heads, size)[0]
    torch.testing.assert_close(found.pop("losses"), expected.pop("losses"), atol=1e-5, rtol=1e-5)
    assert found == expected
    assert len(expected["ended"][0]) == 4 and len({tuple(row) for row in expected["at once"]}) == 4


@pytest.mark.parametrize("suite", ["loss", "ruler"])
def test_a_whole_evaluation(pool: GlooPool, small: Small, tmp_path: Path, suite: str) -> None:
    asked = [
        f"checkpoint={small.hf}", f"dataset={small.data}", f"suite={suite}", "loss.seq_len=128",
        "loss.tokens=1024", "ruler.samples=2", "ruler.lengths=[512]", "ruler.tasks=[niah_single_1]",
        "generate.chunk=100",
    ]  # fmt: skip
    run(compose("eval", [*asked, f"out={tmp_path / 'one'}"]))
    shared = pool(jobs.evaluate, asked, str(tmp_path / "four"))[0]
    one = jobs.results_of(str(tmp_path / "one"))
    assert sorted(shared) == sorted(one) == [suite]
    _assert_alike(shared, one, "")
    wrote = [sorted(p.name for p in (tmp_path / name).rglob("*.jsonl")) for name in ("one", "four")]
    assert wrote[0] == wrote[1] and len(wrote[0]) == (3 if suite == "ruler" else 0)


def _assert_alike(a: Any, b: Any, where: str, rel: float = 1e-4, floor: float = 1e-6) -> None:
    """Equal JSON, numbers up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_alike(a[key], b[key], f"{where}.{key}", rel, floor)
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_alike(x, y, f"{where}[{i}]", rel, floor)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=rel, abs=floor), where
    else:
        assert a == b, where


@pytest.mark.multi_gpu
@pytest.mark.parametrize("suite", ["loss", "ruler"])
def test_the_command_on_two_gpus(tmp_path: Path, suite: str) -> None:
    """In bf16, with heads that our kernels take: numbers agree up to its rounding."""
    wide = build(tmp_path / "wide", head_dim=64)
    asked = [
        "eval", f"checkpoint={wide.hf}", f"dataset={wide.data}", f"suite={suite}", "loss.seq_len=512",
        "loss.tokens=8192", "ruler.samples=2", "ruler.lengths=[2048]", "ruler.tasks=[niah_single_1]",
        "generate.chunk=700",
    ]  # fmt: skip
    assert main([*asked, f"out={tmp_path / 'one'}"]) == 0
    assert main([*asked, f"out={tmp_path / 'two'}", "sequence_parallel=2"]) == 0
    one, two = (jobs.results_of(str(tmp_path / name)) for name in ("one", "two"))
    laws = [report[suite].pop("power_law", None) for report in (one, two)]  # a fit of noise
    assert (laws[0] is None) == (laws[1] is None)
    _assert_alike(two, one, "", rel=5e-3, floor=2e-2)


@pytest.mark.slow
def test_the_command_starts_the_processes(small: Small, tmp_path: Path) -> None:
    asked = [
        "eval",
        f"checkpoint={small.hf}",
        f"dataset={small.data}",
        "suite=loss",
        "loss.seq_len=128",
        "device=cpu",
    ]
    assert main([*asked, "loss.tokens=1024", f"out={tmp_path / 'one'}"]) == 0
    assert main([*asked, "loss.tokens=1024", f"out={tmp_path / 'two'}", "sequence_parallel=2"]) == 0
    _assert_alike(jobs.results_of(str(tmp_path / "two")), jobs.results_of(str(tmp_path / "one")), "")
    assert list((tmp_path / "two" / "logs").rglob("stderr.log"))  # of the second process


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sequence_parallel=3", "does not divide the model's 4 query heads"),
        ("loss.seq_len=101", "loss.seq_len=101: not a multiple of sequence_parallel=2"),
    ],
)
def test_what_cannot_be_shared_out(small: Small, tmp_path: Path, override: str, message: str) -> None:
    asked = [f"checkpoint={small.hf}", f"dataset={small.data}", "suite=loss", f"out={tmp_path}"]
    with pytest.raises(UserError, match=message):
        prepare(compose("eval", [*asked, "sequence_parallel=2", override]))


def test_bad_input_starts_no_process(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.start_workers", lambda *_: pytest.fail("started"))
    asked = ["eval", f"checkpoint={small.hf}", "suite=ruler", f"out={tmp_path}", "sequence_parallel=2"]
    assert main([*asked, "ruler.tasks=[nothing]"]) == 2
    assert "nothing" in capsys.readouterr().err
