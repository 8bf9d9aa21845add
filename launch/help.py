"""Help texts, made of the schema's own comments and the groups found on disk."""

from __future__ import annotations

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from conf.compose import group_choices, root_groups
from conf.docs import walk
from conf.schema import ROOTS
from launch.command import Command, console


def overview(commands: list[Command]) -> None:
    """Print `moba --help`."""
    out = console()
    out.print("[bold]moba[/] COMMAND key=value ...   train and evaluate language models with block attention\n")
    table = Table.grid(padding=(0, 3))
    for command in commands:
        table.add_row(f"  [bold]{command.name}[/]", command.summary)
    out.print(table)
    out.print("\nmoba COMMAND --help   keys, defaults, groups and examples of a command")
    out.print("moba COMMAND ... --cfg   print the resolved configuration and stop")


def show(command: Command) -> None:
    """Print `moba COMMAND --help`."""
    out = console()
    out.print(f"[bold]moba {command.name}[/] key=value ...   {escape(command.summary)}\n")
    out.print(escape(command.text.strip()) + "\n")
    out.print("[bold]Examples[/]")
    for example in command.examples:
        out.print(f"  {escape(example)}", soft_wrap=True)
    _groups(command)
    out.print("\n[bold]Keys[/] (Hydra: key=value sets, +key=value adds to a dict, ~key removes; list: key=[1,2])")
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for column in ("key", "type", "default", ""):
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    for doc in walk(ROOTS[command.root]):
        table.add_row(*(escape(text) for text in (doc.key, doc.type, doc.default, doc.comment)))
    out.print(Padding(table, (0, 0, 0, 2)))


def _groups(command: Command) -> None:
    groups = root_groups(command.root)
    if not groups:
        return
    out = console()
    choices = group_choices()
    out.print("\n[bold]Groups[/] (group=choice)")
    table = Table.grid(padding=(0, 3))
    for name in groups:
        table.add_row(f"  {name}", ", ".join(choices[name]))
    if "recipe" in groups:
        table.add_row(
            "  stage", f"{', '.join(choices['stage'])}   (+stage@stages.NAME=choice adds one to the chain)"
        )
        plans = ", ".join(choices["attention"])
        table.add_row("  attention", f"{plans}   (attention@stages.NAME.attention=choice)")
    out.print(table)
