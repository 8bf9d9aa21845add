"""The resolved plan of a run as tables: what `dry_run=true` prints."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from conf.inherit import stage_ropes
from conf.schema import AttentionConfig, RopeConfig, StageConfig, TrainConfig
from launch.command import console
from launch.stages import Progress


def print_plan(config: TrainConfig, progress: Progress) -> None:
    """Print model, processes and one row per stage."""
    from model.shapes import num_parameters

    out = console()
    parallel = config.mesh.sequence_parallel
    out.print(
        f"[bold]{escape(config.out)}[/]: {num_parameters(config.model):,} parameters, {config.engine.precision}, "
        f"ZeRO {config.engine.zero_stage}, {config.launch.world} processes "
        f"({config.launch.world // parallel} data-parallel x {parallel} sequence-parallel)"
    )
    table = Table()
    for name in ("stage", "seq_len", "tokens", "steps", "batch", "attention", "rope", "lr", "data"):
        table.add_column(name, justify="right" if name in ("seq_len", "tokens", "steps", "batch") else "left")
    ropes = stage_ropes(config.stages)
    for name, stage in config.stages.items():
        table.add_row(*(escape(cell) for cell in (name, *_row(stage, config, ropes[name]))))
    out.print(table)
    total = sum(num_steps(stage) for stage in config.stages.values())
    last = total if config.max_steps is None else min(total, config.max_steps)
    out.print(
        f"{sum(stage.tokens for stage in config.stages.values()):,} tokens in {total} steps; stops at {last}"
    )
    if start := config.init.hf or config.init.checkpoint:
        out.print(f"starts from {escape(start)}")
    if progress.stage:
        out.print(f"{escape(config.out)} is at step {progress.step}, stage {progress.stage}")


def num_steps(stage: StageConfig) -> int:
    """Optimizer steps of a stage."""
    return stage.tokens // (stage.global_batch * stage.seq_len)


def attention_text(attention: AttentionConfig, num_layers: int) -> str:
    """The attention plan over the stage, one part per change: `full`, or `moba 64x8, from 20%: moba 64x4`."""
    from model.schedule import describe, plan

    warmups = len(attention.topk_warmup)
    changes = {0.0, attention.full_after if attention.full_after < 1 else 0.0}
    changes |= {attention.topk_warmup_until * (index + 1) / warmups for index in range(warmups)}
    parts: list[str] = []
    last = ""
    for fraction in sorted(changes):
        text = describe(plan(attention, num_layers, fraction))
        if text != last:
            parts.append(f"from {fraction:.0%}: {text}" if parts else text)
        last = text
    return "; ".join(parts)


def plans_text(config: TrainConfig) -> str:
    """The attention plan of every stage, one line each: stands above `config.yaml`."""
    layers = config.model.num_layers
    return "\n".join(
        f"attention of {name}: {attention_text(stage.attention, layers)}" for name, stage in config.stages.items()
    )


def _row(stage: StageConfig, config: TrainConfig, rope: RopeConfig) -> list[str]:
    rate = stage.lr
    weights = sum(stage.data.domains.values())
    data_parallel = config.launch.world // config.mesh.sequence_parallel
    accumulation = stage.global_batch // (data_parallel * stage.micro_batch)
    return [
        f"{stage.seq_len:,}",
        f"{stage.tokens:,}",
        str(num_steps(stage)),
        f"{stage.global_batch} = {data_parallel}x{stage.micro_batch}x{accumulation}",
        attention_text(stage.attention, config.model.num_layers),
        _rope_text(rope),
        f"{rate.peak:g} {rate.schedule}, warmup {rate.warmup:.0%}, to {rate.peak * rate.min_ratio:g}",
        ", ".join(f"{name} {weight / weights:.0%}" for name, weight in stage.data.domains.items()),
    ]


def _rope_text(rope: RopeConfig) -> str:
    scale = "" if rope.kind == "default" else f" {rope.kind} x{rope.factor:g}"
    return f"theta {rope.theta:g}{scale}"
