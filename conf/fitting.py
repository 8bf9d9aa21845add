"""Values that would fit, in words, for messages."""

from __future__ import annotations


def around(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, as text."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def any_of(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
