"""EleutherAI's lm-eval harness on this engine: its tasks, prompts and metrics, our model with MoBA.

Requests are packed as documents and run without padding (`eval.harness_engine`), so that the same weights under
full attention get the scores of lm-eval's own `hf` model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

# MoBA paper, table 2: task of the harness -> examples in the prompt. What the harness lacks is left out: LooGLE,
# SimpleQA and the sanitized MBPP; RULER is `suite=ruler`, at 128K in the paper. LongBench is cut at 32K there
# (lm_eval.max_length=32768), and MMLU Pro asks for a chain of thought, as the harness's task does.
MOBA_PAPER: dict[str, int] = {
    "agieval": 0,
    "bbh": 3,
    "ceval-valid": 5,
    "gsm8k": 5,
    "hellaswag": 0,
    "hendrycks_math": 0,
    "mbpp": 3,
    "mmlu": 0,
    "mmlu_pro": 5,
    "humaneval": 0,
    "triviaqa": 0,
    "longbench": 0,
}
CODE = ("humaneval", "mbpp")
PRESETS: dict[str, dict[str, int]] = {"": {}, "moba_paper": MOBA_PAPER}


def require_harness() -> None:
    """Raises UserError if lm-eval is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("suite=lm_eval needs the lm-eval package: pip install 'longmoba[eval]'")


def task_shots(preset: str, tasks: Sequence[str], shots: int) -> dict[str, int | None]:
    """Tasks to run with their examples; None: as the task itself says.

    Raises:
        UserError: no task.
    """
    chosen: dict[str, int | None] = {**PRESETS[preset], **dict.fromkeys(tasks, None)}
    if not chosen:
        raise UserError("suite=lm_eval needs tasks=[NAME, ...] or lm_eval.preset=moba_paper")
    return {task: (shots if shots >= 0 else own) for task, own in chosen.items()}


def run_tasks(
    model: TemplateLM, tasks: dict[str, int | None], include: str = "", limit: int = 0, code: bool = False
) -> dict[str, Any]:
    """Scores by task: {task: {"shots", "metrics": {name: value}, "errors": {name: standard error}, "documents"}}.

    Args:
        include: folder of task YAML files besides the harness's own; empty: none.
        limit: documents per task; 0: all.
        code: run the code that models write (HumanEval, MBPP).

    Raises:
        UserError: a task the harness does not know, or one that runs code without being allowed to.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include and not Path(include).is_dir():
        raise UserError(f"lm_eval.include={include} is not a folder")
    unsafe = [task for task in tasks if task.startswith(CODE)]
    if unsafe and not code:
        raise UserError(
            f"tasks {', '.join(unsafe)} run code that the model writes: allow it with lm_eval.code=true"
        )
    if unsafe:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # asked for by the metric's own guard
    # Reading all of the harness's own task files takes a while: only if one of them is asked for.
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=include or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"tasks={unknown}: unknown to lm-eval; lm_eval.include=FOLDER adds task files of your own")
    results: dict[str, Any] = {}
    for shots in dict.fromkeys(tasks.values()):  # one call for all with the same number: each call has a start-up
        found = simple_evaluate(
            model=model,
            tasks=[task for task, number in tasks.items() if number == shots],
            num_fewshot=shots,
            limit=limit or None,
            task_manager=manager,
            confirm_run_unsafe_code=code,
            log_samples=False,
            bootstrap_iters=1000,
        )
        results |= {name: _scores(name, row, found) for name, row in found["results"].items()}
    return results


def _scores(name: str, row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    metrics = {k.removesuffix(",none"): float(v) for k, v in numbers.items() if "," in k and "_stderr" not in k}
    errors = {
        k.replace("_stderr", "").removesuffix(",none"): float(v) for k, v in numbers.items() if "_stderr" in k
    }
    documents = found.get("n-samples", {}).get(name, {}).get("effective")
    return {
        "shots": found.get("n-shot", {}).get(name),
        "metrics": metrics,
        "errors": {k: v for k, v in errors.items() if v == v},  # not a number: a single document
        "documents": documents,
    }
