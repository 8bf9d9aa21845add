"""lm-eval's tasks on our engine against lm-eval's own `hf` model, on a local task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from conf.schema import GenerateConfig
from eval.harness import MOBA_PAPER, run_tasks, task_shots
from eval.harness_engine import Engine, harness_model
from eval.load import Loaded, load_model
from eval.row_scores import score_rows
from model.schedule import LayerPlan, full_plans
from tests.eval.build import Small

FULL, MOBA = full_plans(2), (LayerPlan("moba", 16, 2),) * 2
TASKS = {
    "local_choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "local_words": """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
""",
    "local_answer": """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n", "sky"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def loaded(small: Small) -> Loaded:
    return load_model(small.hf, "cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'longmoba[eval]'")
    root = tmp_path_factory.mktemp("tasks")
    words = ["the grass", "is green", " and blue", "sky over", "here we go", "number 7"]
    rows = [
        {"text": " ".join(words[(i + j) % 6] for j in range(i % 9 + 1)), "choices": words[:4], "answer": i % 4}
        for i in range(23)
    ]
    rows[3]["text"] = "back again " * 80  # longer than the model
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (root / f"{name}.yaml").write_text(text.format(data=data))
    return root


def ours(loaded: Loaded, plans: tuple[LayerPlan, ...] = FULL) -> Any:
    return harness_model(Engine(loaded, plans, plans, GenerateConfig(batch=3), loaded.source.seq_len))


@pytest.fixture(scope="module")
def theirs(small: Small, tasks: Path) -> Any:
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    pytest.importorskip("peft", reason="lm-eval's hf model needs peft")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(small.hf), device="cpu", dtype="float32", batch_size=4)


def test_scores_equal_those_of_the_hf_model(loaded: Loaded, theirs: Any, tasks: Path) -> None:
    asked: dict[str, int | None] = {"local_choice": 2, "local_words": None, "local_answer": None}
    got, expected = (run_tasks(model, asked, str(tasks)) for model in (ours(loaded), theirs))
    assert list(got) == list(expected) == list(asked)
    for task in asked:
        assert got[task]["metrics"] == pytest.approx(expected[task]["metrics"], rel=1e-5), task
        assert got[task]["documents"] == 23
    assert got["local_choice"]["shots"] == 2 and 0 < got["local_choice"]["metrics"]["acc"] < 1
    assert got["local_choice"]["errors"]["acc"] > 0


def test_requests_equal_those_of_the_hf_model(loaded: Loaded, theirs: Any) -> None:
    """Request by request, the values behind the scores; texts with and without a context, some too long."""
    from lm_eval.api.instance import Instance

    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(kind, {}, item, i) for i, item in enumerate(arguments)]

    text = "the grass is green and blue " * 3
    pairs = [
        ("the grass", " is green"),
        ("", "sky over"),
        (text, "here we"),
        (text * 9, " go back"),
        ("sky ", "x"),
    ]
    got, expected = (m.loglikelihood(requests("loglikelihood", pairs)) for m in (ours(loaded), theirs))
    for (value, greedy), (their_value, their_greedy) in zip(got, expected, strict=True):
        assert value == pytest.approx(their_value, rel=1e-5) and greedy == their_greedy
    rolling = [("the",), (text,), (text * 9,)]
    got, expected = (
        m.loglikelihood_rolling(requests("loglikelihood_rolling", rolling)) for m in (ours(loaded), theirs)
    )
    assert got == pytest.approx(expected, rel=1e-5)
    kinds: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 20}
    asked = [(prompt, kinds) for prompt in ("the grass", text, text * 9, "number", "over here")]
    got, expected = (m.generate_until(requests("generate_until", asked)) for m in (ours(loaded), theirs))
    assert got == expected and len(set(got)) > 2


def test_moba_scores_differ(loaded: Loaded, tasks: Path) -> None:
    plain, moba = (run_tasks(ours(loaded, plans), {"local_words": None}, str(tasks)) for plans in (FULL, MOBA))
    assert plain["local_words"]["metrics"] != moba["local_words"]["metrics"]


def test_unknown_tasks_and_sampling_are_refused(loaded: Loaded, tasks: Path) -> None:
    from lm_eval.api.instance import Instance

    with pytest.raises(UserError, match=r"lm_eval\.code"):
        run_tasks(ours(loaded), {"humaneval": None})
    with pytest.raises(UserError, match="not a folder"):
        run_tasks(ours(loaded), {"x": None}, "/nonexistent")
    kinds = {"do_sample": True, "temperature": 1.0}
    with pytest.raises(UserError, match="greedy"):
        ours(loaded).generate_until([Instance("generate_until", {}, ("a", kinds), 0)])


def test_scored_rows_equal_the_model(loaded: Loaded) -> None:
    """Without lm-eval: packed rows against one row at a time."""
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randint(3, 300, (n,), generator=generator).tolist(), k) for n, k in ((2, 1), (90, 7), (33, 32))]
    for plans in (FULL, MOBA):
        got = score_rows(loaded, plans, rows)
        for (tokens, number), (value, greedy) in zip(rows, got, strict=True):
            length = len(tokens) - 1
            ids, borders = torch.tensor([tokens[:-1]]), torch.tensor([0, length], dtype=torch.int32)
            with torch.no_grad():
                hidden = loaded.model.hidden(ids, torch.arange(length)[None], borders, length, plans)
                likely = torch.log_softmax(loaded.model.logits(hidden)[0].double(), -1)[-number:]
            wanted = torch.tensor(tokens[-number:])
            assert value == pytest.approx(float(likely.gather(1, wanted[:, None]).sum()), rel=1e-5)
            assert greedy == bool((likely.argmax(-1) == wanted).all())


def test_presets() -> None:
    assert task_shots("moba_paper", ["mine"], -1) == {**MOBA_PAPER, "mine": None}
    assert set(task_shots("moba_paper", [], 1).values()) == {1}
    with pytest.raises(UserError, match="needs tasks"):
        task_shots("", [], -1)


def test_preset_has_the_papers_shots() -> None:
    """Table 2 of arXiv 2502.13189, in its order, without what lm-eval does not have."""
    table = {
        "AGIEval": ("agieval", 0),
        "BBH": ("bbh", 3),
        "CEval": ("ceval-valid", 5),
        "GSM8K": ("gsm8k", 5),
        "HellaSWAG": ("hellaswag", 0),
        "Loogle": (None, 0),
        "Competition Math": ("hendrycks_math", 0),
        "MBPP": ("mbpp", 3),
        "MBPP Sanitized": (None, 0),
        "MMLU": ("mmlu", 0),
        "MMLU Pro, chain of thought": ("mmlu_pro", 5),
        "OpenAI HumanEval, pass@1": ("humaneval", 0),
        "SimpleQA": (None, 0),
        "TriviaQA": ("triviaqa", 0),
        "LongBench @32K": ("longbench", 0),
        "RULER @128K": (None, 0),  # suite=ruler
    }
    assert dict(shots for shots in table.values() if shots[0]) == MOBA_PAPER


@pytest.mark.slow
def test_preset_names_are_known(tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    assert [task for task in MOBA_PAPER if not manager.match_tasks([task])] == []
