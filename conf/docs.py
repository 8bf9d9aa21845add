"""What the schema says about its fields: types, defaults and the comments beside them, read from its source.

Help texts and messages come from here, so they cannot drift from `conf/schema/`.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import tokenize
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf import schema

ANY_NAME = "NAME"  # stands for the free keys of a dict of dataclasses, as in `stages.NAME.tokens`


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """One leaf key of a root: dotted path, type as text, default as text and the comment beside it."""

    key: str
    type: str
    default: str
    comment: str


def walk(cls: type[Any], prefix: str = "") -> Iterator[FieldDoc]:
    """Every leaf key below dataclass `cls`, in the order of the schema."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, key = _without_none(hints[field.name]), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default_factory):  # it may be a subclass with defaults of its own
            hint = field.default_factory
        value_type = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        if dataclasses.is_dataclass(hint):
            yield from walk(typing.cast("type[Any]", hint), f"{key}.")
        elif value_type is not None and dataclasses.is_dataclass(value_type):
            yield from walk(typing.cast("type[Any]", value_type), f"{key}.{ANY_NAME}.")
        else:
            owners = (base.__name__ for base in cls.__mro__)
            comment = next((c for name in owners if (c := field_comments().get((name, field.name)))), "")
            yield FieldDoc(key, _type_text(hints[field.name]), _default_text(field), comment)


def comment_of(cls: type[Any], key: str) -> str:
    """The comment beside `key` of root `cls`; the name of a stage or data set in it matches any name."""
    wanted = key.split(".")
    for doc in walk(cls):
        parts = doc.key.split(".")
        if len(parts) == len(wanted) and all(p in (w, ANY_NAME) for p, w in zip(parts, wanted, strict=True)):
            return doc.comment
    return ""


@cache
def field_comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment at the end of the field's line in `conf/schema/`."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(Path(schema.__file__).parent.glob("*.py")):
        found |= _comments_in(path.read_text(encoding="utf-8"))
    return found


def _comments_in(source: str) -> dict[tuple[str, str], str]:
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[tuple[str, str], str] = {}
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                lines = range(item.lineno, (item.end_lineno or item.lineno) + 1)
                found[node.name, item.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def _without_none(hint: Any) -> Any:
    """`X` for `Optional[X]` of a dataclass, else the hint itself."""
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return inner[0] if typing.get_origin(hint) is typing.Union and dataclasses.is_dataclass(inner[0]) else hint


def _type_text(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else _generic_text(hint)


def _generic_text(hint: Any) -> str:
    args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    inner = ", ".join(_type_text(arg) for arg in args)
    return (
        f"{inner} | null"
        if typing.get_origin(hint) is typing.Union
        else f"{typing.get_origin(hint).__name__}[{inner}]"
    )


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default == MISSING:
        return "required"
    if field.default is None:
        return "null"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
