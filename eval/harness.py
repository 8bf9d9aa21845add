"""EleutherAI's lm-eval harness on this engine: its tasks, prompts and metrics, our model with MoBA.

Requests are packed as documents and run without padding. Token handling is that of lm-eval's own `hf` model, so
that the same weights under full attention get the same scores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.schema import GenerateConfig
from eval.generate import generate
from eval.load import Loaded
from eval.row_scores import score_rows
from model.schedule import LayerPlan

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

# MoBA paper, table 2: task of the harness -> examples in the prompt. What the harness lacks is left out: LooGLE,
# SimpleQA and the sanitized MBPP; RULER is `suite=ruler`, at 128K in the paper.
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


def harness_model(
    loaded: Loaded,
    plans: Sequence[LayerPlan],
    decode_plans: Sequence[LayerPlan],
    settings: GenerateConfig,
    max_length: int,
) -> TemplateLM:
    """The model as the harness wants it. A function, so that lm-eval is imported only where it is used.

    Args:
        plans: for prompts and scored text; `decode_plans` for generated tokens.
        max_length: tokens of prompt and answer; longer prompts lose their oldest tokens.
    """
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    tokenizer = loaded.tokenizer.hf

    class Engine(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.max_length, self.max_gen_toks = max_length, 256

        @property
        def eot_token_id(self) -> int:
            return loaded.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            bos = tokenizer.bos_token_id
            return loaded.tokenizer.eos_id if bos is None else int(bos)

        @property
        def tokenizer_name(self) -> str:
            return loaded.tokenizer.fingerprint

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """As `hf`: the tokenizer's own special tokens, but never a second BOS."""
            if add_special_tokens is None and string.startswith(tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
            kinds = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer.encode(string, **kinds))

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            rows = [((context + answer)[-(max_length + 1) :], len(answer)) for _, context, answer in requests]
            return score_rows(loaded, plans, rows)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            rows, owners = [], []
            for number, request in enumerate(requests):
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=max_length,
                    context_len=1,
                )
                for context, answer in map(utils.make_disjoint_window, windows):
                    rows.append((context + answer, len(answer)))
                    owners.append(number)
            sums = [0.0] * len(requests)
            for number, (value, _) in zip(owners, score_rows(loaded, plans, rows), strict=True):
                sums[number] += value
            return sums

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            end = tokenizer.decode(self.eot_token_id)
            asked = []
            for number, request in enumerate(requests):
                kinds = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
                if kinds.get("do_sample"):
                    raise UserError("lm-eval asks for sampling; only greedy generation is implemented")
                stops = tuple(handle_stop_sequences(kinds.get("until"), eos=end))
                asked.append((number, request.args[0], stops, int(kinds["max_gen_toks"])))
            asked.sort(key=lambda item: (item[2], item[3], len(item[1])))
            texts = [""] * len(requests)
            for batch in _alike(asked, settings.batch):
                stops, tokens = batch[0][2], batch[0][3]
                if tokens >= max_length:
                    raise UserError(
                        f"{tokens} tokens are to be generated: set lm_eval.max_length above {max_length}"
                    )
                prompts = [self.tok_encode(text)[-(max_length - tokens) :] for _, text, _, _ in batch]
                answers = generate(
                    loaded.model,
                    prompts,
                    max_new_tokens=tokens,
                    eos_id=self.eot_token_id,
                    prefill_plans=plans,
                    decode_plans=decode_plans,
                    chunk=settings.chunk,
                    ended=_stops_at(tokenizer, stops),
                )
                for (number, *_), new in zip(batch, answers, strict=True):
                    text = tokenizer.decode(new, skip_special_tokens=True)
                    texts[number] = postprocess_generated_text(text, list(stops), None)
            return texts

    return Engine()


def _stops_at(tokenizer: Any, stops: Sequence[str]) -> Callable[[list[int]], bool]:
    longest = max(map(len, stops), default=0)

    def ended(new: list[int]) -> bool:
        tail = tokenizer.decode(new[-longest - 8 :])  # a token is at least a byte; some room for cut characters
        return any(stop in tail for stop in stops if stop)

    return ended


def _alike(asked: Sequence[tuple[int, str, tuple[str, ...], int]], size: int) -> list[list[Any]]:
    """Batches of at most `size` requests with the same stops and budget."""
    batches: list[list[Any]] = []
    for item in asked:
        if not batches or len(batches[-1]) == size or batches[-1][0][2:] != item[2:]:
            batches.append([])
        batches[-1].append(item)
    return batches
