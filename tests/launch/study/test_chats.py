from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import UserError
from data.writer import is_heldout
from launch.study.chats import conversations, turns, write_chats
from launch.study.corpus import build_corpus
from tests.launch.study.texts import make_packages

SOURCE = '''"""Doc."""
import os


def first(a):
    """What it does."""
    total = a + 1234567890123456789
    return total * 98765432109876543210


def second(b):
    value = b - 1234567890123456789 + 42
    return value * 98765432109876543210


def third(c):
    value = c - 1234567890123456789 + 43
    return value * 98765432109876543210
'''


def test_turns_are_the_file_cut_at_bodies() -> None:
    found = list(turns(SOURCE))
    assert "".join(shown + body for shown, body in found) == SOURCE
    assert [body.splitlines()[0].strip()[:5] for _, body in found if body] == ["total", "value"]
    assert found[0][0].endswith('"""What it does."""\n')  # the docstring is the question, not the answer
    assert "def second" in found[1][0] and "b - 1234567890123456789" in found[1][0]  # every other body is shown


def test_what_is_no_python_gives_nothing() -> None:
    assert list(turns("def broken(:\n")) == []


def test_conversations_fill_their_size_and_keep_the_split(tmp_path: Path) -> None:
    root = make_packages(tmp_path / "in", 30)
    build_corpus(tmp_path / "text", [root], 10**9, (15_000, 6_000))
    out = tmp_path / "chats.jsonl"
    count = write_chats(tmp_path / "text", out, 4000, 0.3, 60)
    rows = {n: json.loads(line) for n, line in enumerate(out.read_text().splitlines(), 1) if line}
    assert len(rows) == count > 5
    held = {n for n in rows if is_heldout(f"{out.name}:{n}", 0.3)}
    from_held = {
        json.dumps(messages)
        for folder in (tmp_path / "text").iterdir()
        if is_heldout(folder.name, 0.3)
        for messages in conversations(folder, 4000)
    }
    assert held and {n for n, row in rows.items() if json.dumps(row["messages"]) in from_held} == held
    for row in rows.values():
        sizes = [len(message["content"]) for message in row["messages"]]
        assert 0.8 * 4000 <= sum(sizes) <= 4000
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(sizes) // 2)


def test_too_little_code_is_told(tmp_path: Path) -> None:
    build_corpus(tmp_path / "text", [make_packages(tmp_path / "in", 1)], 10**9)
    with pytest.raises(UserError, match="too few functions"):
        write_chats(tmp_path / "text", tmp_path / "chats.jsonl", 10**6, 0.3, 10)
