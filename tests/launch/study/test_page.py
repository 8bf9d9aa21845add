from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conf.schema import StudyConfig
from launch.packages import ROOT
from launch.study.laws import training_flops
from launch.study.page import write_page
from launch.study.places import Places
from launch.study.plan import load_plan
from launch.study.stats import read_results
from model.flops import flops_per_token
from model.schedule import LayerPlan

RESULTS = ROOT / "docs/results"


@pytest.mark.parametrize("name", ["extension", "granularity", "parity", "sft_hybrid", "trailing"])
def test_pages_are_what_their_results_say(name: str, tmp_path: Path) -> None:
    """A page in docs/results is written from the raw results beside it, by this code, and by nobody's hand."""
    if (RESULTS / name / "arms").is_dir():
        shutil.copytree(RESULTS / name / "arms", tmp_path / "arms")
    shutil.copy(RESULTS / name / "text.json", tmp_path)
    for folder in ("earlier", "unfinished"):
        if (RESULTS / name / folder).is_dir():
            shutil.copytree(RESULTS / name / folder, tmp_path / folder)
    config = StudyConfig(name=name, scale="h200", out=str(tmp_path))
    page = write_page(load_plan(name), config, Places.of(config))
    assert page.read_text(encoding="utf-8") == (RESULTS / name / "README.md").read_text(encoding="utf-8")
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (RESULTS / name).glob("*.png")}
    assert all(path.stat().st_size < 200_000 for path in tmp_path.glob("*.png"))


def test_flops_are_those_of_the_stages_and_their_plans() -> None:
    results = {result["arm"]: result for result in read_results(RESULTS / "granularity/earlier")}
    from conf.schema import ModelConfig

    moba = results["blocks-8of32-s0"]
    model = ModelConfig(**moba["model"])
    each = flops_per_token(model, 32_768, (LayerPlan("moba", 1024, 8),) * model.num_layers).total
    assert training_flops(moba) == pytest.approx(each * 1_048_576)
    assert training_flops(results["blocks-full-s0"]) > training_flops(moba)
