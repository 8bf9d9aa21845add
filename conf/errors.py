"""The one exception a user is meant to read, and how it is printed."""

from __future__ import annotations

import sys


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, which key or file, what would work.

    Commands and workers print it as `error: <message>` and exit with code 2, without a traceback.
    """


def complain(message: object) -> None:
    """One line on stderr, as every refusal is printed; a terminal's control characters in it are spelled out."""
    line = " ".join(str(message).split())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    print(f"error: {line}", file=sys.stderr, flush=True)
