"""Tables of a study's page beyond losses: scores of tasks and the device's time, means over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from launch.study.plan import Group
from launch.study.stats import Arms, Json, baseline_of, stderr

DEPTH = "depth "
Row = tuple[str, str, str, dict[int, str]]  # arm, what, seeds, text by length
Scores = dict[tuple[str, int], list[float]]  # (what, tokens) -> percent, by seed


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def task_parts(name: str, arms: Arms) -> list[str]:
    """Scores by length, in percent: of needles by depth, of RULER's tasks; nothing where no arm has any."""
    rows: list[Row] = []
    failed: list[str] = []
    lengths: set[int] = set()
    for key, seeds in arms.items():
        scores: Scores = {}
        for seed, result in sorted(seeds.items()):
            for task in result["tasks"]:
                if "error" in task:
                    failed.append(f"{' '.join(key) or name}, seed {seed}: {task['suite']} failed: {task['error']}")
                    continue
                for what, length, score in _scores_of(task):
                    scores.setdefault((what, length), []).append(score)
        lengths |= {length for _, length in scores}
        rows += _depth_rows(" ".join(key) or name, scores)
        for what in dict.fromkeys(what for what, _ in scores if not what.startswith(DEPTH)):
            cells = {length: _mean_text(found) for (one, length), found in scores.items() if one == what}
            count = max(len(found) for (one, _), found in scores.items() if one == what)
            rows.append((" ".join(key) or name, what, str(count), cells))
    if not rows:
        return failed
    order = sorted(lengths)
    lines = [[arm, what, count, *(cells.get(n, "") for n in order)] for arm, what, count, cells in rows]
    head = f"**{name}**: percent right by length of the prompt in tokens; mean of the seeds ± its standard error"
    return [head, table(["arm", "task", "seeds", *(f"{n:,}" for n in order)], lines), *failed]


def _depth_rows(arm: str, scores: Scores) -> list[Row]:
    """The needle grid as one row: in each cell the means at every depth."""
    depths = list(dict.fromkeys(what for what, _ in scores if what.startswith(DEPTH)))
    if not depths:
        return []
    cells, count = {}, 0
    for length in dict.fromkeys(length for what, length in scores if what == depths[0]):
        found = [scores[depth, length] for depth in depths]
        count = max(count, *map(len, found))
        cells[length] = " / ".join(f"{sum(one) / len(one):.0f}" for one in found)
    what = "needles at depths of " + ", ".join(depth.removeprefix(DEPTH) for depth in depths) + " %"
    return [(arm, what, str(count), cells)]


def _scores_of(task: Json) -> list[tuple[str, int, float]]:
    """(what, tokens, percent) of one suite's result under the only plan that it was asked of."""
    found = []
    if task["suite"] == "needle":
        for plan, grid in task["grids"].items():
            for at, length in enumerate(task["lengths"]):
                column = [line[at] for line in grid]
                found.append((f"needles, {plan}", length, sum(column) / len(column)))
                found += [
                    (f"{DEPTH}{depth}", length, score) for depth, score in zip(task["depths"], column, strict=True)
                ]
        return found
    for plan, lengths in task["plans"].items():
        for length, own in lengths["lengths"].items():
            found += [(f"RULER {one}, {plan}", int(length), score) for one, score in own["scores"].items()]
    return found


def _mean_text(scores: Sequence[float]) -> str:
    error = stderr(scores)
    return f"{sum(scores) / len(scores):.0f}" + ("" if error is None else f" ± {error:.0f}")


def time_parts(name: str, group: Group, arms: Arms) -> list[str]:
    """Seconds of the device per million tokens by stage, for arms of more than one stage that ran alone."""
    alone = {key: {seed: one for seed, one in seeds.items() if one["workers"] == 1} for key, seeds in arms.items()}
    alone = {key: seeds for key, seeds in alone.items() if seeds and _stages(seeds) > 1}
    if not alone or not group.baseline:
        return []
    stages = list(next(iter(next(iter(alone.values())).values()))["train"]["stages"])
    rows = []
    for key, seeds in alone.items():
        base = baseline_of(group, key)
        row = [" ".join(key), " ".join(map(str, sorted(seeds)))]
        for stage in stages:
            own = {seed: _per_million(one, stage) for seed, one in seeds.items()}
            text = _seconds_text(list(own.values()))
            common = sorted(own.keys() & alone.get(base or (), {}).keys())
            if base and common:
                times = [_per_million(alone[base][seed], stage) / own[seed] for seed in common]
                text += f" ({_seconds_text(times)} × faster)"
            row.append(text)
        minutes = [sum(_taken(one, stage) for stage in stages) / 60 for one in seeds.values()]
        rows.append([*row, _seconds_text(minutes)])
    lengths = next(iter(next(iter(alone.values())).values()))["train"]["stages"]
    titles = [f"{stage}, {lengths[stage]['seq_len']:,} tokens" for stage in stages]
    head = f"**{name}**: device seconds for a million tokens of training, alone on the GPU; ± over seeds"
    return [head, table(["arm", "seeds", *titles, "GPU minutes in all"], rows)]


def _stages(seeds: dict[int, Json]) -> int:
    return len(next(iter(seeds.values()))["train"]["stages"])


def _taken(result: Json, stage: str) -> float:
    train = result["train"]
    return float((train.get("steady_seconds") or train["step_seconds"])[stage])


def _per_million(result: Json, stage: str) -> float:
    """`stages` has the tokens that the run had read at the end of each."""
    ends = [one["tokens"] for one in result["train"]["stages"].values()]
    at = list(result["train"]["stages"]).index(stage)
    return _taken(result, stage) / (ends[at] - (ends[at - 1] if at else 0)) * 1e6


def _seconds_text(values: Sequence[float]) -> str:
    error = stderr(values)
    return f"{sum(values) / len(values):.2f}" + ("" if error is None else f" ± {error:.2f}")
