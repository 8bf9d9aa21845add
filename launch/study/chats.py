"""Conversations made of source code: the user shows what stands before a function's body, the assistant writes it.

The turns of a conversation go through the files of one document of the corpus, so that late answers may use early
files. Every second function's body is asked for; the others stay in the user's text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from conf.errors import UserError
from data.writer import is_heldout

EVERY = 2  # one of so many functions is asked for
SHORTEST, LONGEST = 60, 4000  # characters of a body
_CONTROL = re.compile(r"</?s>|<unk>")  # what the tokenizer would read as control tokens

Message = dict[str, str]


def write_chats(corpus: Path, out: Path, chars: int, heldout: float, most: int) -> int:
    """One conversation of at most `chars` characters a line, about `most` from all over `corpus`.

    A conversation stands on a line whose name hashes into the split of its document: what is held out of the text
    is held out of the conversations too, and nothing else.

    Returns:
        How many there are.
    Raises:
        UserError: no document holds enough functions.
    """
    waiting: dict[bool, list[str]] = {True: [], False: []}
    for folder in sorted(path for path in corpus.iterdir() if path.is_dir()):
        held = is_heldout(folder.name, heldout)
        for messages in conversations(folder, chars):
            waiting[held].append(json.dumps({"messages": messages}))
    total = sum(map(len, waiting.values()))
    if not all(waiting.values()):
        raise UserError(f"{corpus}: too few functions for conversations of {chars} characters in both splits")
    step = max(1, total // most)
    waiting = {held: queue[::step] for held, queue in waiting.items()}
    lines: list[str] = []
    while any(waiting.values()):
        queue = waiting[is_heldout(f"{out.name}:{len(lines) + 1}", heldout)]
        lines.append(queue.pop() if queue else "")  # an empty line keeps the numbers going
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sum(map(bool, lines))


def conversations(folder: Path, chars: int) -> Iterator[list[Message]]:
    """Conversations of `chars` characters (at most, and at least nine tenths) from the files of one document."""
    messages: list[Message] = []
    size, before = 0, ""
    for path in sorted(folder.rglob("*.py.txt")):
        before += f"\n# {path.relative_to(folder).with_suffix('')}\n"
        for shown, body in turns(path.read_text(encoding="utf-8")):
            before += shown
            if not body:
                continue
            room = chars - size
            if len(before) + len(body) > room:
                if size >= 0.9 * chars and messages:
                    yield messages
                messages, size = [], 0
                before = before[-min(len(before), chars // 8) :]
            messages += [{"role": "user", "content": before}, {"role": "assistant", "content": body}]
            size, before = size + len(before) + len(body) + 24, ""  # 24: what the template writes around a turn


def turns(source: str) -> Iterator[tuple[str, str]]:
    """(text before, body of a function) in the order of the file; the last one without a body."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines, done = source.splitlines(keepends=True), 0
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    functions.sort(key=lambda node: node.lineno)
    for number, node in enumerate(functions):
        first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
        start, end = first.lineno - 1, node.end_lineno or 0
        body = "".join(lines[start:end])
        if start <= max(done, node.lineno - 1) or number % EVERY or _CONTROL.search(source):
            continue
        if len(body.strip()) >= SHORTEST and len(body) <= LONGEST:
            yield "".join(lines[done:start]), body
            done = end
    yield "".join(lines[done:]), ""
