"""`moba prepare inspect`: the mixture of each stage, as tables and a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from conf.domains import set_of
from conf.paths import RunPaths
from conf.schema import TrainConfig
from launch.command import console

if TYPE_CHECKING:
    from data.inspect import StageReport

PICTURE = "mixture.png"
BELOW = 1 << 10  # documents up to this many tokens are shown together


def run(config: TrainConfig) -> int:
    """Prepare what can be prepared, count, print, and write `plots/mixture.png` below `config.out`."""
    from conf.validate import validate
    from data.inspect import inspect
    from data.prepare import prepare_sets
    from data.store import TokenStore

    validate(config, config.launch.nproc)
    prepare_sets(config.data)
    world = config.launch.nproc // config.mesh.sequence_parallel
    reports: dict[str, StageReport] = {}
    for name, stage in config.stages.items():
        paths = {domain: Path(config.data.sets[set_of(stage.data, domain)].path) for domain in stage.data.domains}
        stores = {domain: TokenStore(path, "train") for domain, path in paths.items()}
        reports[name] = inspect(stage, stores, config.seed, name, world)
        show(name, reports[name], world)
    picture = RunPaths(Path(config.out)).plots / PICTURE
    draw(reports, picture)
    print(f"wrote {picture}")
    return 0


def show(name: str, report: StageReport, world: int) -> None:
    """Print one stage."""
    out = console()
    sampled = "" if report.rows == report.total_rows else f", {report.rows:,} of them sampled"
    out.print(
        f"[bold]{escape(name)}[/]: {report.total_rows:,} rows of {report.seq_len:,} tokens{sampled}; "
        f"padding {report.padding:.2%}"
        + (
            f"; attention of the slowest of {world} ranks over the mean: {report.imbalance[0]:.1%} in order, "
            f"{report.imbalance[1]:.1%} balanced"
            if world > 1
            else ""
        )
    )
    table = Table()
    titles = (
        "domain", "share", "epochs", "documents", "left out", "padding", "in cut documents", "with loss", "weight",
    )  # fmt: skip
    for title in titles:
        table.add_column(title, justify="left" if title == "domain" else "right")
    total = sum(one.tokens for one in report.domains.values())
    for domain, one in report.domains.items():
        table.add_row(
            escape(domain),
            f"{one.tokens / total:.1%}",
            f"{one.epochs:.2f}",
            f"{one.documents:,}",
            f"{one.left_out:,}",
            f"{one.padding / max(one.rows * report.seq_len, 1):.2%}",
            f"{one.cut / max(one.tokens, 1):.1%}",
            f"{one.targets:.1%}",
            f"{one.weight:.3g}",
        )
    out.print(table)
    out.print(_lengths(report, total))


def _lengths(report: StageReport, total: int) -> Table:
    """Share of the tokens by the length of their document, a column per domain."""
    table = Table(title="share of tokens by document length", title_justify="left")
    table.add_column("tokens")
    for name in (*report.domains, "all"):
        table.add_column(escape(name), justify="right")
    counts = [_grouped(one.by_length) for one in report.domains.values()]
    for bucket in sorted(set().union(*counts)):
        label = f"up to {bucket:,}" if bucket <= BELOW else f"{bucket // 2:,} to {bucket:,}"
        cells = [count[bucket] / max(sum(count.values()), 1) for count in counts]
        everything = sum(count[bucket] for count in counts) / total
        table.add_row(label, *(f"{share:.1%}" if share else "" for share in cells), f"{everything:.1%}")
    return table


def _grouped(by_length: Counter[int]) -> Counter[int]:
    grouped: Counter[int] = Counter()
    for bucket, tokens in by_length.items():
        grouped[max(bucket, BELOW)] += tokens
    return grouped


def draw(reports: dict[str, StageReport], path: Path) -> None:
    """One panel per stage: share of tokens by document length, stacked by domain."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    from eval.style import LIGHT

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(LIGHT.settings()):
        figure = Figure(figsize=(9, 3.2 * len(reports)), layout="constrained")
        names = sorted({name for report in reports.values() for name in report.domains})
        colours = {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}
        for panel, (stage, report) in zip(
            figure.subplots(len(reports), squeeze=False)[:, 0], reports.items(), strict=True
        ):
            total = sum(one.tokens for one in report.domains.values())
            grouped = {name: _grouped(one.by_length) for name, one in report.domains.items()}
            buckets = sorted(set().union(*grouped.values()))
            bottom = [0.0] * len(buckets)
            for name, counts in grouped.items():
                shares = [100 * counts[bucket] / total for bucket in buckets]
                label = f"{name}, {report.domains[name].tokens / total:.0%}"
                panel.bar(range(len(buckets)), shares, bottom=bottom, color=colours[name], label=label)
                bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
            labels = [f"≤ {b >> 10}K" if b >= 1 << 10 else f"≤ {b}" for b in buckets]
            panel.set_xticks(range(len(buckets)), labels)
            panel.set(
                title=f"{stage}: rows of {report.seq_len:,}, padding {report.padding:.1%}", ylabel="% of tokens"
            )
            panel.set_xlabel("tokens of the document")
            panel.legend(fontsize=8)
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, format="png")
        temporary.replace(path)
