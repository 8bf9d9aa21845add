"""`moba eval` on a small Hugging Face folder: files, numbers, the page; and what is refused."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.paths import RunPaths
from conf.schema import EvalAttentionConfig, EvalConfig, GateConfig, LossSuiteConfig, RulerConfig
from eval.load import compared_plans, find_source, load_model
from eval.report import write_report
from eval.run import run
from model.schedule import FULL, LayerPlan
from tests.eval.build import Small

HOSTILE = "<script>alert(1)</script> & \"x\" 'y' $\\frac{a}{b}$"


def config(small: Small, out: Path, **changes: Any) -> EvalConfig:
    values: dict[str, Any] = {
        "checkpoint": str(small.hf),
        "out": str(out),
        "dataset": str(small.data),
        "device": "cpu",
        "loss": LossSuiteConfig(tokens=1024, bucket=16, trailing=8),
        "ruler": RulerConfig(tasks=["niah_single_1"], lengths=[512], samples=2),
        "gate": GateConfig(queries=16),
    }
    return EvalConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": s, "tokens": 100 * s, "stage": HOSTILE, "loss": 6 - s / 10, "plan": "full"}
        for s in range(1, 6)
    ]
    rows += [{"kind": "train", "step": 6, "tokens": 600, "stage": "b", "loss": 5, "plan": HOSTILE, "seq_len": 64}]
    rows += [{"kind": "eval", "step": s, "tokens": 100 * s, "heldout_loss": 6.0 - s / 5} for s in (0, 6)]
    RunPaths(out).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunPaths(out).config.write_text(f"out: '{HOSTILE}'\n")
    run(config(small, out))
    return out


def read(out: Path, suite: str) -> dict[str, Any]:
    return json.loads((RunPaths(out).eval / f"{suite}.json").read_text())


def test_loss_file(small: Small, finished: Path) -> None:
    loss = read(finished, "loss")
    assert list(loss["plans"]) == ["full", "moba"]
    full, moba, difference = loss["plans"]["full"], loss["plans"]["moba"], loss["difference"]
    for part in ("heldout", "trailing"):
        gap = moba[part]["loss"] - full[part]["loss"]
        assert difference[part]["loss"] == pytest.approx(gap, abs=1e-6) and gap != 0
        assert full[part]["tokens"] == moba[part]["tokens"] > 0
    assert len(full["buckets"]) == 128 // 16
    # a random model is no better than chance on the whole, and block 0 knows no other block
    assert difference["buckets"][0]["estimate"]["loss"] == pytest.approx(0, abs=1e-6)
    assert loss["seq_len"] == 128 and loss["trailing_tokens"] == 8
    assert loss["power_law"]["full"]["rmse"] >= 0
    assert loss["plan_texts"] == {"full": "full", "moba": "moba 16x2"}


def test_ruler_and_gate_files(finished: Path) -> None:
    ruler, gate = read(finished, "ruler"), read(finished, "gate")
    assert set(ruler["plans"]) == {"full", "moba"}
    assert all(plan["lengths"]["512"]["filled"]["niah_single_1"] > 0.85 for plan in ruler["plans"].values())
    assert [layer["layer"] for layer in gate["layers"]] == [0, 1] and gate["seq_len"] == 128
    assert len(list((RunPaths(finished).eval / "ruler").glob("pred-*"))) == 2


class Tags(HTMLParser):
    """Elements and attributes of a page, and whether every element is closed."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_has_all_parts_and_loads_nothing(finished: Path) -> None:
    markup = RunPaths(finished).report.read_text()
    tags = Tags(markup)
    assert not tags.open
    titles = re.findall(r"<h2>(.*?)</h2>", markup)
    assert titles == ["Training", "Loss", "RULER", "Gate", "Configuration"]
    sources = [attrs.get("src") or attrs.get("srcset") for tag, attrs in tags.found if tag in ("img", "source")]
    assert len(sources) == 10 and all(source and source.startswith("data:image/png;base64,") for source in sources)
    for name in ("loss", "position", "ruler", "gate", "gate-value"):
        png = (RunPaths(finished).plots / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and base64.b64encode(png).decode() in markup
    assert not {tag for tag, _ in tags.found} & {"script", "link", "iframe", "a"}
    assert "http" not in re.sub(r'http-equiv|data:image[^"]*', "", markup)
    assert "Longer than the checkpoint&#x27;s 128 tokens: 512." in markup
    assert "prefers-color-scheme: dark" in markup and 'name="viewport"' in markup


def test_hostile_names_are_text(small: Small, finished: Path) -> None:
    markup = RunPaths(finished).report.read_text()
    assert "<script" not in markup and "&lt;script&gt;" in markup
    for suite in ("loss", "ruler", "gate"):
        path = RunPaths(finished).eval / f"{suite}.json"
        content = json.loads(path.read_text())
        content["checkpoint"]["name"] = HOSTILE
        content["plan_texts"] = {HOSTILE: HOSTILE}
        path.write_text(json.dumps(content))
    markup = write_report(finished, None).read_text()
    assert "<script" not in markup and "<title>&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;x&quot;" in markup


def test_report_of_nothing_but_a_loss(small: Small, tmp_path: Path) -> None:
    run(config(small, tmp_path, suite="loss", attention=EvalAttentionConfig(kind="full")))
    markup = RunPaths(tmp_path).report.read_text()
    assert re.findall(r"<h2>(.*?)</h2>", markup) == ["Loss", "Configuration"]
    assert read(tmp_path, "loss")["difference"] is None
    assert not (RunPaths(tmp_path).eval / "gate.json").exists()


def test_second_run_answers_nothing_again(small: Small, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(finished, "ruler")["plans"]
    monkeypatch.setattr("eval.load.generate", lambda *_, **__: pytest.fail("asked again"))
    run(config(small, finished, suite="ruler"))
    assert read(finished, "ruler")["plans"] == before


def test_no_document_is_long_enough(small: Small, tmp_path: Path) -> None:
    settings = LossSuiteConfig(seq_len=4096, tokens=4096)
    run(config(small, tmp_path, suite="loss", loss=settings))
    assert read(tmp_path, "loss")["plans"]["full"]["trailing"]["loss"] is None
    assert "No held-out document has more than 4,096 tokens" in RunPaths(tmp_path).report.read_text()


def test_weights_arrive(small: Small) -> None:
    loaded = load_model(small.hf, "cpu")
    assert not loaded.model.training and loaded.tokenizer.fingerprint == small.tokenizer.fingerprint
    assert loaded.bos is None and loaded.source.seq_len == 128
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(small.hf).state_dict()
    for name, parameter in loaded.model.named_parameters():
        assert parameter.equal(theirs[name])


def test_compared_plans(small: Small) -> None:
    source = find_source(small.hf)
    full, moba = (FULL, FULL), (LayerPlan("moba", 16, 2),) * 2

    def plans(**attention: Any) -> dict[str, Any]:
        return compared_plans(source, EvalAttentionConfig(**attention))

    assert plans() == {"full": full, "moba": moba}
    assert plans(topk=5)["moba"] == (LayerPlan("moba", 16, 5),) * 2
    assert plans(choose="window")["moba"] == (LayerPlan("moba", 16, 2, "window"),) * 2
    assert plans(kind="full") == {"full": full}
    last_full = plans(kind="moba", block_size=32, topk=3, full_last_layers=1)
    assert last_full["moba"] == (LayerPlan("moba", 32, 3), FULL)
    with pytest.raises(UserError, match=r"attention\.topk=0"):
        plans(kind="moba", block_size=32)
    with pytest.raises(UserError, match="multiple of 16"):
        plans(block_size=20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "/nonexistent"}, "does not exist"),
        ({"dataset": ""}, "set dataset=FOLDER"),
        ({"ruler": RulerConfig(tasks=["qa_1"], samples=1)}, "qa_1 needs"),
        ({"checkpoint": []}, "nothing to evaluate"),
        ({"suite": "report"}, "takes `out` folders"),
        ({"suite": "lm_eval"}, "needs tasks"),
    ],
)
def test_refused_before_anything_is_written(
    small: Small, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(config(small, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
