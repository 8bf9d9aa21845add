"""Loss against training compute over model sizes: L(C) = a C^-b for each kind of attention, with its errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.schema import ModelConfig
from launch.study.stats import Arms, Json, difference, mean_curve, mean_of, stderr


@dataclass(frozen=True)
class Law:
    """A fit over the sizes. Errors are standard errors over the fits of single seeds; None with fewer than two.

    `compute` and `losses` are the points fitted: FLOPs of the dense parts in an arm's training, which are the same
    with full attention and MoBA, and the mean loss of its seeds.
    `worst` is the largest distance of a point from the fit, in nats.
    """

    scale: float
    exponent: float
    error: float | None
    compute: tuple[float, ...]
    losses: tuple[float, ...]
    worst: float

    def at(self, flops: float) -> float:
        return self.scale * flops**-self.exponent

    @property
    def text(self) -> str:
        over = f"{len(self.compute)} sizes, farthest point {self.worst:.4f} nats off"
        error = "one seed" if self.error is None else f"± {self.error:.4f} over seeds"
        return f"L = {self.scale:.2f} C^-{self.exponent:.4f} (exponent {error}; {over})"


def laws(arms: Arms) -> dict[str, Law]:
    """By attention, of arms keyed (size, attention): those with three sizes or more, and a loss that falls."""
    found = {}
    for kind in dict.fromkeys(attention for _, attention in arms):
        own = {size: seeds for (size, attention), seeds in arms.items() if attention == kind}
        law = _law(own)
        if law is not None:
            found[kind] = law
    return found


def _law(own: dict[str, dict[int, Json]]) -> Law | None:
    if len(own) < 3:
        return None
    compute = [dense_flops(next(iter(seeds.values()))) for seeds in own.values()]
    losses = [mean_of(seeds, 0, "loss").value for seeds in own.values()]
    scale, exponent = fit(compute, losses)
    if exponent <= 0:
        return None
    common = set.intersection(*(set(seeds) for seeds in own.values()))
    single = [
        fit(compute, [mean_of({seed: seeds[seed]}, 0, "loss").value for seeds in own.values()])[1]
        for seed in sorted(common)
    ]
    worst = max(abs(scale * c**-exponent - loss) for c, loss in zip(compute, losses, strict=True))
    return Law(scale, exponent, stderr(single), tuple(compute), tuple(losses), worst)


def size_gap(arms: Arms) -> str:
    """MoBA minus full attention over the sizes and seeds that have both, with the error over these pairs."""
    gaps: list[float] = []
    for size in dict.fromkeys(size for size, _ in arms):
        one = difference(arms.get((size, "moba"), {}), arms.get((size, "full"), {}), 0, "loss")
        gaps += one.by_seed if one else ()
    error = stderr(gaps)
    return "" if error is None else f"{sum(gaps) / len(gaps):+.4f} ± {error:.4f} ({len(gaps)} pairs)"


def use_of_context(arms: Arms) -> list[tuple[str, int, float, float]]:
    """Of every pair: size, seed, how far full attention's loss falls from the first position bucket to the mean of
    the others, and MoBA minus full attention over all positions; nats."""
    found = []
    for size in dict.fromkeys(size for size, _ in arms):
        full, moba = arms.get((size, "full"), {}), arms.get((size, "moba"), {})
        for seed in sorted(full.keys() & moba.keys()):
            _, means = mean_curve({seed: full[seed]}, 0)
            rest = sum(mean.value for mean in means[1:]) / (len(means) - 1)
            gap = difference({seed: moba[seed]}, {seed: full[seed]}, 0, "loss")
            if gap is not None:
                found.append((size, seed, means[0].value - rest, gap.value))
    return found


def fit(compute: list[float], losses: list[float]) -> tuple[float, float]:
    """(a, b) of L = a C^-b by least squares of the logarithms."""
    x, y = [math.log(c) for c in compute], [math.log(loss) for loss in losses]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
    return math.exp(y_mean - slope * x_mean), -slope


def dense_flops(result: Json) -> float:
    """FLOPs outside attention of the arm's training and of that of its start: matrices, forward and backward."""
    from model.flops import flops_per_token
    from model.schedule import FULL

    config = ModelConfig(**result["model"])
    each = flops_per_token(config, 1, (FULL,) * config.num_layers).dense
    before = dense_flops(result["start"]) if result.get("start") else 0.0
    return before + float(result["train"]["steps"][-1][0] * each)


def training_flops(result: Json) -> float:
    """Useful FLOPs of the arm's own training: its steps under the plan of each stage, its start not counted."""
    from model.flops import flops_per_token
    from model.schedule import FULL, LayerPlan

    config, total, before = ModelConfig(**result["model"]), 0.0, 0
    for stage, facts in result["train"]["stages"].items():
        text = next(str(plan) for name, plan in result["train"]["plans"] if name == stage)
        layer = FULL
        if text.startswith("moba"):
            size, topk = text.split()[1].split("x")
            layer = LayerPlan("moba", int(size), int(topk))
        tokens, before = facts["tokens"] - before, facts["tokens"]
        total += tokens * flops_per_token(config, facts["seq_len"], (layer,) * config.num_layers).total
    return total
