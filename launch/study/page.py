"""The page of a study: what was asked, expected, run and found, with every finished arm and its errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, StudyConfig
from eval.files import write_atomic
from launch.study.laws import laws, size_gap
from launch.study.pictures import draw_all
from launch.study.places import Places
from launch.study.plan import Group, Plan, arms_of
from launch.study.sets import TEXT
from launch.study.stats import (
    UNFINISHED,
    Arms,
    Json,
    baseline_of,
    by_choice,
    difference,
    longest,
    mean_of,
    own_plan,
    plan_difference,
    read_results,
)
from launch.study.task_page import table, task_parts, time_parts

EARLIER = "earlier"  # folder beside a page: page and results of a plan that was superseded


def write_page(plan: Plan, config: StudyConfig, places: Places) -> Path:
    """Plots and README.md in `places.out`, from the results that are there. Returns the page's path."""
    results = read_results(places.out)
    pictures = draw_all(config.name, plan, results, places.out)
    parts = [
        f"# {plan.title}",
        f"*Study `{config.name}`; MoBA report (arXiv 2502.13189), {plan.paper}.*",
        plan.question,
    ]
    parts += ["## Expected", plan.expected]
    if plan.expected_later:
        parts.append(plan.expected_later)
    parts += ["## What came out"]
    if plan.found and config.scale != "tiny":
        parts.append(plan.found)
    if (places.out / EARLIER / "README.md").is_file():
        parts.append(f"Runs of an earlier plan of this study, superseded: [their page]({EARLIER}/README.md).")
    if plan.timed:
        from launch.study.speed_page import speed_parts

        parts += speed_parts(places.out)
    for name, group in plan.groups.items():
        parts += _group_parts(name, group, by_choice(results, name, group))
    parts += [f"![{Path(file).stem}]({file})" for file in pictures]
    if not plan.timed:
        parts += [
            "## What was run",
            _run_text(plan, config, results),
            _text_text(places.out),
            _arms_table(results),
        ]
    parts += [
        "## What differs from the paper",
        plan.differs,
        "## Again, at any size",
        _again(plan, config, results),
    ]
    path = places.out / "README.md"
    write_atomic(path, ("\n\n".join(part.strip() for part in parts if part.strip()) + "\n").encode())
    return path


def _group_parts(name: str, group: Group, arms: Arms) -> list[str]:
    """A table per length: means of the arms, and differences to the baseline."""
    parts: list[str] = []
    if not arms:
        return parts
    some = next(iter(next(iter(arms.values())).values()))
    for at, place in enumerate(some["losses"]):
        parts += _loss_parts(name, group, arms, at, place)
    if set(group.axes) == {"size", "attention"}:
        fits = [f"- {kind}: {law.text}" for kind, law in laws(arms).items()]
        gap = size_gap(arms)
        fits += [f"- MoBA minus full, all sizes and seeds: {gap}"] if gap else []
        parts += ["**Power laws**, C in FLOPs of the dense parts:", "\n".join(fits)] if fits else []
    return parts + task_parts(name, arms) + time_parts(name, group, arms)


def _loss_parts(name: str, group: Group, arms: Arms, at: int, place: Json) -> list[str]:
    whole = place.get("whole", False)
    measures = ("loss",) if whole else ("loss", "trailing")
    rows = []
    for key, seeds in arms.items():
        row = [
            " ".join(key) or name,
            " ".join(map(str, sorted(seeds))),
            *(mean_of(seeds, at, what).text for what in measures),
        ]
        base = baseline_of(group, key)
        gaps = [difference(seeds, arms.get(base, {}), at, what) if base else None for what in measures]
        gaps.append(plan_difference(seeds, at, "loss"))
        rows.append([*row, *("" if gap is None else _gap_text(gap) for gap in gaps)])
    last = [] if whole else [f"last {place['trailing']:,}"]
    titles = ["arm", "seeds", "loss", *(f"{one} tokens" for one in last)]
    minus = f"minus {group.baseline.partition('=')[2]}"
    if group.baseline:
        titles += [f"{one}, {minus}" for one in ("loss", *last)] + ["same weights: MoBA minus full"]
    count, length = len(place["documents"]), f"{place['seq_len']:,}"
    if whole:
        head = (
            f"answers of {count} held-out retrieval tasks of up to {length} tokens, nats per token of the answer"
        )
    else:
        what = "answers of held-out conversations" if place["set"] == "chat" else "held-out documents"
        head = f"first {length} tokens of {count} {what}"
    return [f"**{name}**: {head}", table(titles, [row[: len(titles)] for row in rows])]


def _gap_text(gap: Any) -> str:
    return gap.signed + ("; one seed" if gap.seeds is None else "" if gap.resolved else "; not resolved")


def _run_text(plan: Plan, config: StudyConfig, results: Sequence[Json]) -> str:
    """Machines, commits and seeds; which arms of the plan are missing."""
    if not results:
        return "Nothing yet."
    done = {result["arm"] for result in results}
    planned = {arm.name for arm in arms_of(plan, StudyConfig(name=config.name, scale=config.scale))}
    facts = [result["environment"] for result in results]
    places = ", ".join(sorted({f"{one['gpu']}, torch {one['torch']}" for one in facts}))
    commits = ", ".join(sorted({f"`{one['commit'][:7]}`" for one in facts}))
    missing = sorted(planned - done)
    dates = ", ".join(sorted({one["date"] for one in facts}))
    text = (
        f"{len(done)} arms on {places}; commits {commits}; {dates}. Every arm that finished is below. Errors "
        "behind ± of a mean are standard errors over seeds; differences are taken document by document. Tokens "
        "are those of the arm's own training, its start not counted. Device seconds are the sum of the steps; "
        "arms of a study that ran side by side (column), and studies that ran at the same time, shared the GPU: "
        "their seconds compare with nothing."
    )
    cut = [result["arm"] for result in results if result.get("cut")]
    if cut:
        text += f" Cut off by the limit of time after what is shown (`{UNFINISHED}/*.json`): {', '.join(cut)}."
    return text + (f" Planned and not run, for lack of device time: {', '.join(missing)}." if missing else "")


def _text_text(out: Path) -> str:
    """Where the text is from, and how it was split; nothing if that was not recorded."""
    path = out / TEXT
    if not path.is_file():
        return ""
    facts = json.loads(path.read_text(encoding="utf-8"))
    train, held = facts["splits"]["train"], facts["splits"]["heldout"]
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in facts["left_out"].items())
    return (
        f"Text: {facts['files']:,} files, {facts['chars'] / 1e6:.1f} million characters of source code and "
        f"documentation below {', '.join(facts['roots'])}, as {facts['documents']} documents of neighbouring "
        f"files of a package. Left out: {left_out} (near-duplicate: {facts['near_duplicate']}). Trained on "
        f"{train['tokens'] / 1e6:.1f}M tokens, of which an arm may see parts that its start has seen; "
        f"{held['documents']} documents with {held['tokens'] / 1e6:.1f}M tokens are held out, and no file is in "
        f"both. Vocabulary: {facts['vocab_size']:,}."
    )


def _arms_table(results: Sequence[Json]) -> str:
    from model.shapes import num_parameters

    rows = []
    for result in results:
        steps = result["train"]["steps"]
        seconds = "; ".join(f"{stage} {value:.1f}" for stage, value in _seconds(result["train"]).items())
        plans = "; ".join(dict.fromkeys(f"{text} @ {result['train']['stages'][stage]['seq_len']:,}"
                                        for stage, text in result["train"]["plans"]))  # fmt: skip
        loss = "–"
        if result.get("losses"):
            mean = mean_of({0: result}, longest(result), "loss").value
            loss = f"{mean:.4f} ({own_plan(result)})"
        parameters = num_parameters(ModelConfig(**result["model"]))
        rows.append([f"`{result['arm']}`", f"{parameters / 1e6:.1f}M", result["starts"] or "fresh",
                     plans, f"{steps[-1][0] / 1e6:.2f}M", f"{_last_tenth(steps):.3f}", loss, seconds,
                     str(result["workers"])])  # fmt: skip
    titles = [
        "arm",
        "parameters",
        "start",
        "attention @ length",
        "tokens",
        "training loss, last tenth",
        "held-out loss",
    ]
    return table([*titles, "device seconds", "side by side"], rows)


def _seconds(train: Json) -> dict[str, float]:
    """By stage: without what the first step took longer, where that was kept."""
    return dict(train.get("steady_seconds") or train["step_seconds"])


def _last_tenth(steps: list[list[Any]]) -> float:
    losses = [step[1] for step in steps[-max(1, len(steps) // 10) :]]
    return float(sum(losses) / len(losses))


def _again(plan: Plan, config: StudyConfig, results: Sequence[Json]) -> str:
    name, workers = config.name, max((result["workers"] for result in results), default=3)
    if plan.timed:
        return f"```bash\nmoba study {name} scale=h200   # on a Hopper GPU; elsewhere what is stored is shown\n```"
    return (
        f"```bash\nmoba study {name}                       # scale tiny: a CPU, a minute or two\n"
        f"moba study {name} scale=h200 workers={workers}   # this page: one H200, minutes\n"
        f"make study-{name} SCALE=h200\n```\n\n"
        f"Another size is another entry under `scales` in [the plan](../../../conf/study/{name}.yaml): "
        "lengths, blocks, tokens, model shapes, seeds. `text=[FOLDER]` takes other text, `set=['KEY=VALUE']` "
        "changes any key of `moba train` in every arm, `joined=false` starts each arm with `moba train` and its "
        "`launch.*`. Raw results: `arms/*.json` beside this page."
    )
