"""What a `moba` command is, and how commands talk to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Command:
    """One `moba` command. `resolve` turns overrides into the root's dataclass, `run` does the work.

    `run` returns the exit code; both raise UserError for bad input.
    """

    name: str
    summary: str  # one line, for `moba --help`
    text: str  # what it does, for `moba NAME --help`
    examples: tuple[str, ...]
    resolve: Callable[[Sequence[str]], Any]
    run: Callable[[Any], int]

    @property
    def root(self) -> str:
        """Its root in `conf.schema.ROOTS`, and its file in conf/."""
        return self.name.replace(" ", "_")


def console() -> Console:
    """Console on stdout; output into files and pipes is wide enough for one key per line."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)
