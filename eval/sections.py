"""The sections of a report, each from the JSON of its suite. What is missing leaves its section out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval import page, plots
from eval.gate import LayerGate
from eval.gate_plots import gate_choices, gate_value
from eval.page import Html
from eval.pictures import Pictures

Json = dict[str, Any]


def subtitle(about: Json) -> str:
    parts = [f"{about['parameters']:,} parameters"] if "parameters" in about else []
    if about.get("tokens") is not None:
        parts.append(f"{about['tokens']:,} tokens seen in {about['step']:,} steps")
    if about.get("stage"):
        parts.append(f"stage {about['stage']}, {about['seq_len']:,} tokens long")
    return " · ".join(parts)


def mixed(found: list[Json]) -> Html | None:
    """A warning when the suites were run on different checkpoints."""
    names = sorted({part["name"] for part in found})
    if len({part["fingerprint"] for part in found}) < 2:
        return None
    return page.paragraph(f"The sections below are of different checkpoints: {', '.join(names)}.", note=True)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value if round(value, digits) else 0.0:.{digits}f}"


def _estimate(value: Json) -> str:
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.4f}"
    return _number(value["loss"]) + error


def summary(loss: Json | None, ruler: Json | None, gate: Json | None, metrics: list[Json]) -> Html | None:
    items: list[tuple[object, object]] = []
    seen = [row for row in metrics if row.get("kind") == "eval" and row.get("heldout_loss") is not None]
    if len(seen) > 1:
        first, last = seen[0], seen[-1]
        fallen = first["heldout_loss"] - last["heldout_loss"]
        items.append(
            (f"−{fallen:.2f}" if fallen >= 0 else f"+{-fallen:.2f}", "nats of held-out loss over the training")
        )
    for name, report in (loss or {"plans": {}})["plans"].items():
        items.append((_number(report["heldout"]["loss"], 3), f"held-out loss, {name} attention"))
    for name, result in (ruler or {"plans": {}})["plans"].items():
        items.append((_number(result["mean"], 1), f"RULER mean of {len(result['tasks'])} tasks, {name} attention"))
    layers = [layer for layer in (gate or {"layers": []})["layers"] if layer["queries"]]
    if layers:
        kept = [share for layer in layers for share in layer["mass_kept"]]
        items.append(
            (f"{100 * sum(kept) / len(kept):.0f} %", "of full attention's mass lies in the chosen blocks")
        )
    return page.tiles(items) if items else None


def training(metrics: list[Json], draw: Pictures) -> Html | None:
    shown = draw(
        "loss",
        lambda theme: plots.loss_by_tokens(metrics, theme),
        "Training and held-out loss by tokens seen",
        "Bands are stages with their sequence length; dashed lines are changes of the attention plan "
        "(block size × topk, the own block counted). Held-out points use the plan of their moment.",
    )
    return page.section("Training", shown) if shown else None


def losses(loss: Json | None, draw: Pictures) -> Html | None:
    if loss is None:
        return None
    plans, trailing = loss["plans"], loss["trailing_tokens"]
    compared = dict(plans) | ({"difference": loss["difference"]} if loss.get("difference") else {})
    rows = [
        (
            name,
            _estimate(report["heldout"]),
            f"{report['heldout']['tokens']:,}",
            _estimate(report["trailing"]),
            f"{report['trailing']['tokens']:,}",
            report["trailing"]["documents"],
        )
        for name, report in compared.items()
    ]
    head = ("attention", "held-out loss", "tokens", f"trailing loss (last {trailing:,})", "tokens", "documents")
    short = all(not report["trailing"]["tokens"] for report in plans.values())
    missing = f"No held-out document has more than {loss['seq_len']:,} tokens: no loss by position."
    return page.section(
        "Loss",
        page.paragraph(
            f"Nats per token at {loss['seq_len']:,} tokens, the same weights under each attention. Errors are "
            "standard errors over documents; the difference is paired, so its error is its own. Trailing loss and "
            "loss by position count only documents that reach the full length."
        ),
        page.table(head, rows),
        page.paragraph(missing, note=True) if short else None,
        draw(
            "position",
            lambda theme: plots.loss_by_position(loss, theme),
            "Loss by position under full attention and MoBA",
            "Bands are 95 % intervals over documents. Dotted: power law L(p) = a p^-b, fitted to the buckets.",
        ),
        _buckets(compared),
        _plans_note(loss),
    )


def _buckets(compared: Json) -> Html | None:
    first = next(iter(compared.values()))
    if not any(bucket["estimate"]["tokens"] for bucket in first["buckets"]):
        return None
    lines = []
    for i, bucket in enumerate(first["buckets"]):
        span = f"{bucket['start']:,}–{bucket['end'] - 1:,}"
        estimates = [_estimate(report["buckets"][i]["estimate"]) for report in compared.values()]
        lines.append((span, *estimates, f"{bucket['estimate']['tokens']:,}"))
    return page.folded("Loss by position as numbers", page.table(("positions", *compared, "tokens"), lines))


def gate_choice(gate: Json | None, gates: list[LayerGate], draw: Pictures) -> Html | None:
    if gate is None:
        return None
    if not gate["layers"]:
        whole = f"On one held-out document of {gate['seq_len']:,} tokens, under full attention."
        return page.section("Gate", page.paragraph(whole), _gate_grid(gate.get("grid", [])))

    def mean(values: list[float]) -> str:
        return f"{100 * sum(values) / len(values):.1f} %" if values else "–"

    rows = [
        (
            f"layer {layer['layer']}",
            *(mean(layer[key]) for key in ("mass_kept", "mass_best", "mass_window", "mass_own")),
            mean(layer["entropy"]),
            mean(layer["never"]),
            "–" if layer["agreement"] is None else f"{100 * layer['agreement']:.1f} %",
        )
        for layer in gate["layers"]
    ]
    head = ("", "mass kept", "best possible", "nearest", "own block", "entropy", "never chosen", "heads agree")
    one = gate["layers"][0]
    return page.section(
        "Gate",
        page.paragraph(
            f"Which blocks of {one['block_size']:,} tokens the queries of one held-out document of "
            f"{gate['seq_len']:,} tokens choose ({one['topk']} with their own). Mass kept: the share of full "
            "attention's probability that lies in the chosen blocks, for queries that had to choose."
        ),
        draw(
            "gate",
            lambda theme: gate_choices(gates, theme),
            "Frequency of chosen blocks by query block and key block",
            "Rows are query blocks, columns key blocks. The diagonal is the own block, which is always read.",
        ),
        draw(
            "gate-value",
            lambda theme: gate_value(gates, theme),
            "Share of attention mass kept, and distance of the chosen blocks",
            "Nearest: a sliding window of equal cost. Best possible: the blocks with the most mass.",
        ),
        page.table(head, rows),
        _gate_grid(gate.get("grid", [])),
    )


def _gate_grid(grid: list[Json]) -> Html | None:
    """What each (block_size, topk) would keep of full attention."""
    if not grid:
        return None
    rows = [
        (
            f"{cell['block_size']:,} × {cell['topk']}",
            *(f"{100 * cell[key]:.1f} %" for key in ("read", "kept", "best", "window")),
        )
        for cell in grid
    ]
    return Html(
        page.paragraph(
            "What other settings would keep, on the same weights under full attention, mean over layers and heads:"
        ).markup
        + page.table(("block size × topk", "keys read", "mass kept", "best possible", "nearest"), rows).markup
    )


def _plans_note(part: Json) -> Html:
    return page.paragraph("; ".join(f"{n}: {text}" for n, text in part["plan_texts"].items()) + ".", note=True)


def configuration(about: Json, config: Path) -> Html:
    rows = [(key.replace("_", " "), value) for key, value in about.get("summary", {}).items()]
    whole = config.read_text(encoding="utf-8") if config.is_file() else ""
    return page.section(
        "Configuration",
        page.table(("", "value"), rows) if rows else None,
        page.folded("config.yaml", page.preformatted(whole)) if whole else None,
    )
