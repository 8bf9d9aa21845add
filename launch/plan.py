"""`moba plan`: what a run will take, before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from conf.compose import compose_plan, override_keys
from conf.gpus import GIB, gpu_named
from conf.schema import PlanConfig
from conf.validate import validate
from launch.command import Command, console
from launch.init import Completion, complete_ropes

if TYPE_CHECKING:
    from launch.plan_fit import Forecast


def resolve(overrides: Sequence[str]) -> PlanConfig:
    """As `moba train` would have it: `init` fills in the model, stages inherit RoPE."""
    completion = Completion(override_keys(overrides))
    config = compose_plan(overrides, completion)
    complete_ropes(config, completion.origin)
    return config


def run(config: PlanConfig) -> int:
    """Print one block per stage. Returns 0 if every stage fits, else 1."""
    from launch.plan_fit import forecast, quicker, suggest
    from launch.plan_rates import measured_rates

    world = config.launch.nproc
    validate(config, world)
    gpu = gpu_named(config.gpu)
    rates = measured_rates(gpu)
    out = console()
    out.print(f"[bold]{world} x {gpu.name}[/], {gpu.memory / GIB:.0f} GiB each; rates: {', '.join(rates.sources)}")
    fits = True
    for name in config.stages:
        found = forecast(config, name, gpu, rates)
        print_forecast(name, found)
        if found.fits:
            print_quicker(quicker(config, name, gpu, rates))
        else:
            fits = False
            print_suggestion(suggest(config, name, gpu, rates))
    return 0 if fits else 1


def print_forecast(name: str, found: Forecast) -> None:
    """Memory and time of one stage, side by side."""
    out = console()
    out.print(
        f"\n[bold]{escape(name)}[/]: {found.job.seq_len:,} tokens, {escape(found.attention)}, "
        f"{found.tokens:,} tokens per step"
    )
    memory = Table("memory per GPU", "GiB", box=None, padding=(0, 2))
    for part, size in found.memory.parts.items():
        if size >= GIB / 200:
            memory.add_row(part, f"{size / GIB:.2f}")
    memory.add_row("allocator and driver", f"{found.overhead / GIB:.2f}")
    memory.add_row("[bold]peak[/]", f"[bold]{found.needed / GIB:.2f}[/] of {found.gpu.memory / GIB:.0f}")
    memory.add_row("host memory, all ranks", f"{found.host / GIB:.2f}")
    time = Table("time per step", "s", "TFLOP per GPU", box=None, padding=(0, 2))
    for part, spent in found.time.seconds.items():
        flops = found.time.flops.get(part)
        if spent:
            time.add_row(part, f"{spent:.3g}", f"{flops / 1e12:,.1f}" if flops else "")
    useful = sum(found.time.flops.values())
    time.add_row("[bold]step[/]", f"[bold]{found.time.total:.3g}[/]", f"{useful / 1e12:,.1f}")
    time.add_row("tokens/s", f"{found.tokens / found.time.total:,.0f}", "")
    time.add_row("MFU", f"{useful / found.time.total / found.gpu.flops:.2f}", "")
    side = Table.grid(padding=(0, 4))
    side.add_row(memory, time)
    out.print(side)
    verdict = "[green]fits[/]" if found.fits else f"[red]does not fit[/]: {found.reason}"
    out.print(f"  {verdict}; highest at: {found.memory.moment}")


def print_suggestion(found: tuple[list[str], Forecast] | None) -> None:
    """The settings that would make a stage fit."""
    if found is None:
        console().print("  nothing that can be switched makes it fit: use more GPUs or a shorter seq_len")
        return
    changes, forecast = found
    console().print(f"  would fit, at {_speed(forecast)}, with: [bold]{escape(' '.join(changes))}[/]")


def print_quicker(found: tuple[list[str], Forecast] | None) -> None:
    """The memory switches that a stage does not need."""
    if found is not None:
        changes, forecast = found
        console().print(f"  faster, at {_speed(forecast)}, with: [bold]{escape(' '.join(changes))}[/]")


def _speed(forecast: Forecast) -> str:
    return f"{forecast.needed / GIB:.1f} GiB and {forecast.tokens / forecast.time.total:,.0f} tokens/s"


COMMAND = Command(
    name="plan",
    summary="memory and time of a run on given GPUs, before it starts",
    text="""
Prints for every stage of a recipe: memory per GPU by part, host memory, FLOPs and time of a step by part,
tokens/s, and whether it fits. Where it does not, the fastest set of memory switches that would; where it does, the
switches that only cost time. Memory is counted tensor by tensor from the shapes; times use the rates measured in
benchmarks/results where there are any. Nothing is started or written. Exit code 1 if a stage does not fit.
""",
    examples=(
        "moba plan recipe=quickstart",
        "moba plan recipe=quickstart launch.nproc=8 gpu=h100",
        "moba plan recipe=quickstart model=llama_1b stages.long.seq_len=1048576 stages.long.tokens=8388608 "
        "eval.tokens=0 stages.long.global_batch=2",
    ),
    resolve=resolve,
    run=run,
)
