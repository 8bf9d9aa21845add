"""The plots of the studies, one light PNG each: what was measured, with its errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.files import write_atomic
from eval.plots import canvas, png_of
from eval.style import LIGHT
from launch.study.laws import dense_flops, laws, use_of_context
from launch.study.plan import Plan
from launch.study.stats import Arms, Json, Key, by_choice, difference, longest, mean_curve, mean_of, stderr

COLOURS = {"full": LIGHT.full, "moba": LIGHT.moba, "hybrid": "#2f8f5b"}
COLOURS |= {"2of8": LIGHT.moba, "32of128": "#2f8f5b"}


def draw_all(name: str, plan: Plan, results: Sequence[Json], out: Path) -> list[str]:
    """Draw what the results allow into `out`; the names of the files."""
    drawn: list[str] = []

    def save(file: str, width: float, height: float, draw: Callable[[Any], bool]) -> None:
        with canvas(LIGHT, width, height) as figure:
            if draw(figure):
                write_atomic(out / file, png_of(figure))
                drawn.append(file)

    for group, described in plan.groups.items():
        arms = by_choice(results, group, described)
        if not arms or group in ("base", "start", "moba", "rates"):
            continue
        if name == "parity":
            save(f"compute-{group}.png", 8.4, 3.5, partial(_compute, arms=arms))
            save(f"position-{group}.png", 8.4, 3.5, partial(_by_size, arms=arms))
            save(f"use-{group}.png", 5.0, 3.5, partial(_use, arms=arms))
        if name in ("trailing", "extension"):
            save(f"position-{group}.png", 8.4, 3.5, partial(_position, arms=arms))
        if name == "extension":
            save(f"needles-{group}.png", 8.4, 3.0, partial(_needles, arms=arms))
        if name == "trailing":
            save(f"switch-{group}.png", 8.4, 3.2, partial(_switch, arms=arms))
        if name == "granularity":
            save("blocks.png", 8.4, 3.5, partial(_by_choice, arms=arms, base=("full",), label="minus full"))
            shown = {key: seeds for key, seeds in arms.items() if key[0] in ("full", "2of8", "32of128")}
            save(f"position-{group}.png", 8.4, 3.5, partial(_position, arms=shown))
        if name == "sft_hybrid":
            save(
                "layers.png",
                8.4,
                3.5,
                partial(_by_choice, arms=arms, base=("0",), label="minus 0 layers"),
            )
    return drawn


def _compute(figure: Any, arms: Arms) -> bool:
    """Loss against training FLOPs by size, with fits; beside it the difference by size."""
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    fitted = laws(arms)
    for kind, mark in (("full", "o"), ("moba", "s")):
        own = [seeds for (_, attention), seeds in arms.items() if attention == kind]
        if not own:
            return False
        means = [mean_of(seeds, 0, "loss") for seeds in own]
        x = [dense_flops(next(iter(seeds.values()))) for seeds in own]
        left.errorbar(x, [m.value for m in means], yerr=[m.seeds or 0.0 for m in means], fmt=mark,
                      color=COLOURS[kind], label=kind, capsize=3)  # fmt: skip
        if law := fitted.get(kind):
            left.plot(x, [law.at(c) for c in x], color=COLOURS[kind], linewidth=1, linestyle=":",
                      label=f"{kind}: exponent {law.exponent:.3f}")  # fmt: skip
    left.set_xscale("log")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    left.xaxis.set_minor_formatter(lambda value, _: "")
    left.set_xlabel("FLOPs of the dense parts in training")
    left.set_ylabel("held-out loss (nats per token)")
    left.legend(fontsize=8.5, loc="upper right", framealpha=0.6)
    left.margins(y=0.35)
    labels = []
    for place, size in enumerate(dict.fromkeys(size for size, _ in arms)):
        gap = difference(arms.get((size, "moba"), {}), arms.get((size, "full"), {}), 0, "loss")
        if gap is None:
            continue
        labels.append((place, size))
        right.errorbar([place], [gap.value], yerr=[2 * gap.error], fmt="s", capsize=4,
                       color=LIGHT.moba)  # fmt: skip
        right.plot([place] * len(gap.by_seed), gap.by_seed, ".", color=LIGHT.accent, markersize=4)
    right.axhline(0, color=LIGHT.faint, linewidth=1)
    right.set_xticks([place for place, _ in labels], [size for _, size in labels])
    right.margins(x=0.3)
    right.set_xlabel("size")
    right.set_ylabel("MoBA minus full (nats)")
    right.set_title("± 2 standard errors; dots: seeds", fontsize=9)
    return True


def _by_size(figure: Any, arms: Arms) -> bool:
    """Full attention's loss by position, from each size's mean; and what MoBA adds to it at each position."""
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for size, mark in zip(dict.fromkeys(size for size, _ in arms), ("o-", "s--", "^:"), strict=False):
        full, moba = arms.get((size, "full"), {}), arms.get((size, "moba"), {})
        if not full.keys() & moba.keys():
            return False
        x, means = mean_curve(full, 0)
        middle = sum(mean.value for mean in means) / len(means)
        left.plot(x, [mean.value - middle for mean in means], mark, color=LIGHT.full, markersize=3.5, label=size)
        x, gaps = mean_curve(moba, 0, minus=full)
        right.errorbar(x, [gap.value for gap in gaps], yerr=[2 * (gap.documents or 0.0) for gap in gaps], fmt=mark,
                       color=LIGHT.moba, markersize=3.5, linewidth=1.2, elinewidth=0.7, label=size)  # fmt: skip
    right.axhline(0, color=LIGHT.faint, linewidth=1)
    left.set_ylabel("full attention: loss minus its mean (nats)")
    right.set_ylabel("MoBA minus full (nats)")
    for axes in (left, right):
        axes.set_xlabel("position in the document (tokens)")
        axes.legend(title="size", fontsize=8.5)
    return True


def _use(figure: Any, arms: Arms) -> bool:
    """MoBA's distance to full attention against how much full attention's loss falls along the document."""
    axes = figure.add_subplot()
    pairs = use_of_context(arms)
    for size, mark in zip(dict.fromkeys(size for size, _, _, _ in pairs), "osD^", strict=False):
        own = [(use, gap) for one, _, use, gap in pairs if one == size]
        axes.plot(*zip(*own, strict=True), mark, color=LIGHT.moba, label=size)
    axes.axhline(0, color=LIGHT.faint, linewidth=1)
    axes.set_xlabel("full attention: loss of the first sixteenth minus the rest (nats)")
    axes.set_ylabel("MoBA minus full (nats)")
    if pairs:
        axes.legend(title="size", fontsize=8.5)
    return bool(pairs)


def _position(figure: Any, arms: Arms) -> bool:
    """Loss by position at the longest length measured; beside it the difference to full attention."""
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    at = longest(next(iter(next(iter(arms.values())).values())))
    base = next((seeds for key, seeds in arms.items() if key[-1] == "full"), None)
    for key, seeds in arms.items():
        x, means = mean_curve(seeds, at)
        colour = COLOURS.get(key[-1], LIGHT.accent)
        left.plot(x, [m.value for m in means], "o-", markersize=3.5, color=colour, label=key[-1], linewidth=1.5)
        if base is None or key[-1] == "full" or not seeds.keys() & base.keys():
            continue
        x, gaps = mean_curve(seeds, at, minus=base)
        error = [2 * (gap.documents or 0.0) for gap in gaps]
        low = [gap.value - e for gap, e in zip(gaps, error, strict=True)]
        high = [gap.value + e for gap, e in zip(gaps, error, strict=True)]
        right.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        right.plot(
            x, [gap.value for gap in gaps], "o-", markersize=3.5, color=colour, label=f"{key[-1]} minus full"
        )
    right.axhline(0, color=LIGHT.faint, linewidth=1)
    left.set_ylabel("held-out loss (nats per token)")
    right.set_title("± 2 standard errors over documents", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("position in the document (tokens)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8.5)
    return True


def _needles(figure: Any, arms: Arms) -> bool:
    """Needles found by depth, a panel per length: means over seeds, with their standard errors."""
    grids = {
        key: [task for result in seeds.values() for task in result["tasks"] if task.get("grids")]
        for key, seeds in arms.items()
    }
    if not all(grids.values()):
        return False
    some = next(iter(grids.values()))[0]
    for at, length in enumerate(some["lengths"]):
        axes = figure.add_subplot(1, len(some["lengths"]), at + 1)
        for key, tasks in grids.items():
            found = [[line[at] for line in next(iter(task["grids"].values()))] for task in tasks]
            by_depth = list(zip(*found, strict=True))
            axes.errorbar(some["depths"], [sum(one) / len(one) for one in by_depth], fmt="o-", markersize=3.5,
                          yerr=[stderr(one) or 0.0 for one in by_depth], capsize=2, linewidth=1.4,
                          color=COLOURS.get(key[-1], LIGHT.accent), label=key[-1])  # fmt: skip
        axes.set_ylim(-5, 105)
        axes.set_title(f"{length:,} tokens", fontsize=9)
        axes.set_xlabel("depth of the needle (percent)")
        if not at:
            axes.set_ylabel("found (percent)")
            axes.legend(fontsize=8.5)
    return True


def _switch(figure: Any, arms: Arms) -> bool:
    """Training loss of the last steps, and the hybrid minus the arm that goes on with MoBA, step by step."""
    found = {key[-1]: seeds for key, seeds in arms.items()}
    common = sorted(found.get("hybrid", {}).keys() & found.get("moba", {}).keys())
    if not common:
        return False
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for seed in common:
        hybrid, moba = (found[kind][seed]["train"]["steps"] for kind in ("hybrid", "moba"))
        number = range(1, len(hybrid) + 1)
        right.plot(number, [a[1] - b[1] for a, b in zip(hybrid, moba, strict=True)], color=COLOURS["hybrid"],
                   label=f"seed {seed}", linewidth=1.4, alpha=1 / (1 + seed))  # fmt: skip
    for kind in ("full", "moba", "hybrid"):
        if common[0] in found.get(kind, {}):
            steps = found[kind][common[0]]["train"]["steps"]
            left.plot(
                range(1, len(steps) + 1), [s[1] for s in steps], color=COLOURS[kind], label=kind, linewidth=1.2
            )
    switch = 0.9 * len(hybrid)
    for axes in (left, right):
        axes.axvline(switch + 0.5, color=LIGHT.faint, linewidth=1, linestyle="--")
        axes.set_xlim(0.7 * len(hybrid), len(hybrid) + 1)
        axes.set_xlabel("step (dashed: the switch to full attention)")
        axes.legend(fontsize=8.5)
    left.set_ylabel(f"training loss, seed {common[0]} (nats)")
    right.set_ylabel("hybrid minus MoBA, same data (nats)")
    return True


def _by_choice(figure: Any, arms: Arms, base: Key, label: str) -> bool:
    """Differences of loss and trailing loss to a base arm, along the choices of the only axis."""
    if base not in arms:
        return False
    others = [key for key in arms if key != base]
    names = [key[0] for key in others]
    for number, what in enumerate(("loss", "trailing"), 1):
        axes = figure.add_subplot(1, 2, number)
        for place, key in enumerate(others):
            gap = difference(arms[key], arms[base], 0, what)
            if gap is None:
                continue
            axes.errorbar([place], [gap.value], yerr=[2 * gap.error], fmt="s", color=LIGHT.moba, capsize=4)
            axes.plot([place] * len(gap.by_seed), gap.by_seed, ".", color=LIGHT.accent, markersize=4)
        axes.axhline(0, color=LIGHT.faint, linewidth=1)
        axes.set_xticks(range(len(others)), names, rotation=30 if max(map(len, names)) > 3 else 0, ha="right")
        axes.set_ylabel(f"{what}, {label} (nats)")
        axes.set_title("± 2 standard errors; dots: seeds", fontsize=9)
    return True
