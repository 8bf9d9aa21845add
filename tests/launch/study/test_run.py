from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from conf.compose import compose
from conf.constants import EXIT_REQUEUE
from conf.errors import UserError
from conf.schema import StudyConfig
from launch.cli import main
from launch.study import measure, worker
from launch.study.places import Places
from launch.study.plan import Arm, Plan, arms_of, load_plan
from launch.study.speed_page import speed_parts
from tests.launch.study.texts import make_packages

TINY = [
    "stages.main.seq_len=64", "stages.main.tokens=512", "stages.main.global_batch=1", "stages.main.micro_batch=1",
    "model.num_layers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A trailing study, smaller than tiny, run once."""
    root = tmp_path_factory.mktemp("study")
    text = make_packages(root / "in", 40)
    quoted = ",".join(f"'{line}'" for line in TINY)
    command = [
        "study", "trailing", "arms=[train-full,train-moba]", "seeds=[0]", f"text=[{text}]", f"set=[{quoted}]",
        f"out={root / 'results'}", f"runs={root / 'runs'}", f"dataset={root / 'data'}", "workers=2",
    ]  # fmt: skip
    assert main(command) == 0
    return root, command


def test_every_arm_leaves_its_losses_by_document_and_a_page(study: tuple[Path, list[str]]) -> None:
    root, _ = study
    results = {path.stem: json.loads(path.read_text()) for path in (root / "results" / "arms").glob("*.json")}
    assert set(results) == {"base-s0", "train-full-s0", "train-moba-s0"}
    moba = results["train-moba-s0"]
    assert moba["train"]["steps"][-1][0] == 512 and moba["plans"]["moba"] == "moba 32x3"
    taken, steady = moba["train"]["step_seconds"]["main"], moba["train"]["steady_seconds"]["main"]
    assert 0 < steady < 2 * taken
    documents = moba["losses"][0]["documents"]
    assert documents and all(len(one["moba"]["buckets"]) == 16 for one in documents)
    first = results["train-full-s0"]["train"]["steps"][0][1]
    assert first == pytest.approx(moba["train"]["steps"][0][1], abs=1e-4)  # 64 tokens, 3 blocks of 32: all is read
    page = (root / "results" / "README.md").read_text()
    for text in (
        "## Expected",
        "| moba | 0 |",
        "`train-moba-s0`",
        "one seed",
        "Planned and not run",
        "train-hybrid-s1",
    ):
        assert text in page
    assert (root / "results" / "position-train.png").is_file()


def test_only_what_is_missing_is_run_again(
    study: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    root, command = study
    kept = root / "results" / "arms" / "train-full-s0.json"
    lost = root / "results" / "arms" / "train-moba-s0.json"
    before, old = kept.stat().st_mtime_ns, json.loads(lost.read_text())
    lost.unlink()
    assert main(command[:-1]) == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text())["losses"] == old["losses"]  # measured again, from the finished run
    assert "1 of 3 arms to run" in capfd.readouterr().out


def test_an_arm_cut_off_while_it_is_measured_keeps_what_it_has(
    study: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = study
    out = tmp_path / "results"
    shutil.copytree(root / "results" / "arms", out / "arms")
    old = json.loads((out / "arms" / "train-moba-s0.json").read_text())
    (out / "arms" / "train-moba-s0.json").unlink()
    quoted = ",".join(f"'{line}'" for line in TINY)
    config = compose(
        "study",
        ["name=trailing", "arms=[train-moba]", "seeds=[0]", f"set=[{quoted}]", f"out={out}",
         f"runs={root / 'runs'}", f"dataset={root / 'data'}", "joined=false"],
    )  # fmt: skip
    plan, places = load_plan("trailing"), Places.of(config)
    [arm] = [arm for arm in arms_of(plan, config) if arm.name == "train-moba-s0"]
    monkeypatch.setattr(measure, "_tasks", lambda *of: (_ for _ in ()).throw(KeyboardInterrupt))
    plan.groups["train"].tasks = ["suite=needle"]
    with pytest.raises(KeyboardInterrupt):
        worker.run_arm(arm, plan, config, places)
    kept = json.loads(places.unfinished(arm).read_text())
    assert not places.result(arm).exists()
    assert kept["losses"] == old["losses"] and kept["train"] == old["train"]


def test_no_arm_begins_after_its_time(study: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    root, _ = study
    places = Places(root / "late", root / "runs-late", root / "data")
    config = StudyConfig(
        name="trailing", arms=["train-full"], out=str(places.out), runs=str(places.runs), joined=False
    )
    assert worker.work(config, deadline=time.time() - 1) == 0
    assert not places.out.exists()


def test_speed_shows_what_is_stored(tmp_path: Path) -> None:
    rows = [
        {"seq_len": n, "num_heads": 1, "num_kv_heads": 1, "head_dim": 128, "block_size": n // 64, "topk": 3,
         "error": 0.002, "fwd_ms": n / 1e5, "dense_fwd_ms": (n / 1e5) ** 2}
        for n in (1 << 19, 1 << 20)
    ]  # fmt: skip
    rows.append({**rows[1], "seq_len": 1 << 21, "fwd_ms": (1 << 21) / 1e5, "dense_fwd_ms": None})
    report = {"gpu": "NVIDIA H200", "commit": "0" * 40, "date": "2026-01-01", "rows": rows}
    (tmp_path / "fixed-share.json").write_text(json.dumps(report))
    text = "\n".join(speed_parts(tmp_path))
    assert "to the power 1.00, dense attention's" in text and "20.97 | – | –" in text
    assert (tmp_path / "fixed-share.png").is_file()


def test_list_and_bad_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "list"]) == 0
    assert "granularity" in capsys.readouterr().out
    assert main(["study", "nothing"]) == 2
    assert main(["study", "parity", "workers=0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize("error", [worker.Stopped(), UserError("broken")])
def test_a_signal_ends_all_and_a_failure_only_what_starts_from_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chain of four arms the second breaks: the third and fourth start from it and are not tried."""
    config = StudyConfig(name="extension", out=str(tmp_path / "out"), runs=str(tmp_path / "runs"), joined=False)
    tried: list[str] = []

    def run_arm(arm: Arm, plan: Plan, config: StudyConfig, places: Places, start: object) -> None:
        tried.append(arm.name)
        if arm.name == "start-s0":
            raise error
        places.result(arm).parent.mkdir(parents=True, exist_ok=True)
        places.result(arm).write_text("{}")

    monkeypatch.setattr(worker, "run_arm", run_arm)
    assert worker.work(config) == (EXIT_REQUEUE if isinstance(error, worker.Stopped) else 1)
    assert tried == ["base-s0", "start-s0"]
