"""The schema as a whole: every field is read somewhere, and choices and comments agree."""

from __future__ import annotations

import ast
import dataclasses
import typing
from typing import Any

import pytest

from conf import schema
from conf.compose import group_choices
from conf.docs import field_comments, walk
from conf.ranges import CHOICES, RANGES
from launch.packages import PACKAGES, ROOT

# What states, checks or prints every field alike is no reader.
NOT_READERS = {ROOT / "conf" / name for name in ("ranges.py", "docs.py", "compose.py")}
NOT_READERS |= set((ROOT / "conf").glob("validate*.py"))
NOT_READERS |= set((ROOT / "conf" / "schema").glob("*.py"))


def _classes() -> list[type[Any]]:
    found = [item for item in vars(schema).values() if isinstance(item, type) and dataclasses.is_dataclass(item)]
    return [item for item in found if item.__module__.startswith(f"{schema.__name__}.")]


FIELDS = [(cls, field.name) for cls in _classes() for field in dataclasses.fields(cls)]
FIELD_IDS = [f"{cls.__name__}.{name}" for cls, name in FIELDS]


def _attributes_read() -> set[str]:
    names: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path not in NOT_READERS:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                names |= {
                    node.attr
                    for node in ast.walk(tree)
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
                }
    return names


@pytest.fixture(scope="module")
def attributes_read() -> set[str]:
    return _attributes_read()


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=FIELD_IDS)
def test_every_field_is_read(cls: type[Any], name: str, attributes_read: set[str]) -> None:
    assert name in attributes_read, f"nothing reads {cls.__name__}.{name}: a setting that is silently ignored"


def test_every_class_hangs_on_a_root() -> None:
    reached: set[type[Any]] = set()

    def visit(cls: type[Any]) -> None:
        reached.add(cls)
        made = [field.default_factory for field in dataclasses.fields(cls)]  # may be a subclass of the hint
        for hint in (*typing.get_type_hints(cls).values(), *made):
            for part in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(part) and part not in reached:
                    visit(typing.cast("type[Any]", part))

    for root in schema.ROOTS.values():
        visit(root)
    assert reached == set(_classes())


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=FIELD_IDS)
def test_choices_and_comments_agree(cls: type[Any], name: str) -> None:
    comment = field_comments().get((cls.__name__, name), "")
    choices = CHOICES.get((cls, name))
    if choices is not None and len(choices) > 1 and comment:
        assert all(choice in comment for choice in choices), comment
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.type == "str" and " | " in comment and name not in ("source",):
        assert choices is not None, f"{cls.__name__}.{name} names choices that nothing checks: {comment}"


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=FIELD_IDS)
def test_numbers_have_a_range(cls: type[Any], name: str) -> None:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.type in ("int", "float", "Optional[int]"):
        lines = [base for base in cls.__mro__ if base in RANGES]
        assert any(name in RANGES[base] for base in lines), f"{cls.__name__}.{name} has no range in conf/ranges.py"


def test_tables_name_real_fields() -> None:
    known = {(cls, field.name) for cls in _classes() for field in dataclasses.fields(cls)}
    assert set(CHOICES) <= known
    assert {(cls, name) for cls, names in RANGES.items() for name in names} <= known


def test_walk_gives_keys_types_defaults_and_comments() -> None:
    docs = {doc.key: doc for doc in walk(schema.TrainConfig)}
    assert docs["out"].default == "required"
    assert docs["stages.NAME.tokens"].comment == "budget; a whole number of global batches"
    assert docs["max_steps"].type == "int | null"
    assert docs["stages.NAME.attention.full_layers"].type == "list[int]"
    assert docs["dry_run"].default == "false"


def test_no_plain_key_has_the_name_of_a_group() -> None:
    """Hydra would read `key=value` as the choice of a group: the key could not be set."""
    for root, cls in schema.ROOTS.items():
        leaves = {doc.key for doc in walk(cls) if "." not in doc.key}
        assert not leaves & set(group_choices()), root
