"""The suites that answer prompts: RULER, the needle grid, the tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.paths import RunPaths
from conf.schema import RulerConfig
from eval import harness, tables
from eval.harness_engine import Engine, harness_model
from eval.ruler.run import Answer, Encoder, run_ruler
from eval.ruler.tasks import NEEDLE
from eval.ruler.texts import Texts
from eval.suites import Evaluation
from model.schedule import LayerPlan, describe, full_plans


def ruler_suite(e: Evaluation) -> dict[str, Any]:
    """RULER under every plan. Samples and predictions stay in `eval/ruler`, so a killed run goes on."""
    texts = Texts(e.config.ruler.data)
    return {
        "benchmark": texts.benchmark,
        "seed": e.config.ruler.seed,
        "template": e.config.ruler.template,
        "texts": {} if e.config.ruler.prompts else texts.facts(e.config.ruler.tasks),
        "prompts": e.config.ruler.prompts,
        **_answered(e, e.config.ruler, texts.benchmark),
    }


def needle_tasks(depths: int) -> list[str]:
    """One task for each depth, evenly spaced from the start of the haystack to its end, in whole percent."""
    return [f"{NEEDLE}{round(100 * i / max(depths - 1, 1)):03d}" for i in range(depths)]


def needle_suite(e: Evaluation) -> dict[str, Any]:
    """One needle by depth and length: RULER's single needle, at a place that is chosen and not drawn."""
    settings, ruler = e.config.needle, e.config.ruler
    tasks = needle_tasks(settings.depths)
    # The deepest first: its haystack is whole up to there, and begins as the others do.
    config = replace(
        ruler,
        tasks=tasks[::-1],
        lengths=settings.lengths,
        samples=settings.samples,
        seed=settings.seed,
        prompts="",
    )
    result = _answered(e, config, "needle")
    grids = {
        name: [[plan["lengths"][str(n)]["scores"][task] for n in settings.lengths] for task in tasks]
        for name, plan in result["plans"].items()
    }
    return {
        **result,
        "depths": [int(task.removeprefix(NEEDLE)) for task in tasks],
        "lengths": list(settings.lengths),
        "samples": settings.samples,
        "seed": settings.seed,
        "haystack": "essays" if ruler.data else "noise",
        "grids": grids,  # percent, by depth and then length
        "plans": {name: {"mean": plan["mean"], "tasks": tasks} for name, plan in result["plans"].items()},
    }


def _answered(e: Evaluation, config: RulerConfig, benchmark: str) -> dict[str, Any]:
    """Samples, answers and scores of RULER-like tasks under every plan."""
    encoder = Encoder(e.loaded.tokenizer, e.loaded.bos)
    settings = e.config.generate
    decode = {name: _decode_plans(plans, settings.decode) for name, plans in e.plans.items()}

    def answer_with(name: str) -> Answer:
        def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
            return e.loaded.generate(
                prompts,
                max_new_tokens=tokens,
                eos_id=e.loaded.tokenizer.end_ids,
                prefill_plans=e.plans[name],
                decode_plans=decode[name],
                chunk=settings.chunk,
                share=name if settings.share else "",
            )

        return answer

    facts = {
        name: {
            "checkpoint": e.loaded.source.fingerprint,
            "dtype": e.about["summary"]["weights"],
            "prefill": describe(plans),
            "decode": describe(decode[name]),
        }
        for name, plans in e.plans.items()
    }
    folder = RunPaths(Path(e.config.out)).eval
    answers = {name: answer_with(name) for name in e.plans}
    with tables.progress() as report:
        steps = report.counter()
        results = run_ruler(config, encoder, folder, answers, facts, steps, settings.batch, benchmark)
    e.loaded.prefixes.clear()
    return {
        "checkpoint": e.about,
        "decode": settings.decode,
        "plans": results,
        "plan_texts": {name: describe(plans) for name, plans in e.plans.items()},
    }


def harness_suite(e: Evaluation) -> dict[str, Any]:
    """Tasks of lm-eval under every plan."""
    settings = e.config.lm_eval
    harness.require_harness()
    from importlib.metadata import version

    tasks = harness.task_shots(settings.preset, e.config.tasks, settings.shots)
    length = settings.max_length or e.loaded.source.seq_len
    results = {}
    for name, plans in e.plans.items():
        decode = _decode_plans(plans, e.config.generate.decode)
        engine = Engine(e.loaded, plans, decode, e.config.generate, length)
        results[name] = harness.run_tasks(
            harness_model(engine), tasks, settings.include, settings.limit, settings.code
        )
    e.loaded.prefixes.clear()
    return {
        "checkpoint": e.about,
        "version": version("lm_eval"),
        "limit": settings.limit,
        "max_length": length,
        "plans": results,
        "plan_texts": {name: describe(plans) for name, plans in e.plans.items()},
    }


def _decode_plans(plans: Sequence[LayerPlan], decode: str) -> tuple[LayerPlan, ...]:
    return tuple(plans) if decode == "moba" else full_plans(len(plans))
