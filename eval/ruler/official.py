"""RULER's own prompt files as samples: `ruler.prompts=DIR`.

Accepted are DIR/<length>/<task>/validation.jsonl, the layout of RULER's results folder with a `data` folder below
the length, and DIR/<length>/<task>.jsonl. `answer_prefix` may be missing, as in files of RULER's first releases,
which carry it at the end of `input`. Samples are numbered by line: RULER's needle tasks write a place in the text
over `index`, so that numbers collide.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

from conf.errors import UserError
from conf.schema import RulerConfig
from eval.files import read_lines, write_lines
from eval.ruler.sample import Sample
from eval.ruler.store import SampleFile, keyed_folder


def found_lengths(root: Path) -> list[int]:
    """Lengths there are prompts for."""
    folders = (path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ()
    return sorted(int(path.name) for path in folders if path.name.isdigit())


def prompt_file(root: Path, length: int, task: str) -> Path:
    """The file of a task at a length.

    Raises:
        UserError: there is none.
    """
    base = root / str(length)
    tried = (
        base / task / "validation.jsonl",
        base / "data" / task / "validation.jsonl",
        base / f"{task}.jsonl",
    )
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"ruler.prompts={root}: no prompts of {task} at {length}, expected {tried[0]}")


def check_prompts(config: RulerConfig) -> None:
    """Refuse missing or short files before anything starts."""
    for length in config.lengths:
        for task in config.tasks:
            path = prompt_file(Path(config.prompts), length, task)
            rows = sum(1 for _ in read_lines(path))
            if rows < config.samples:
                raise UserError(f"{path} has {rows} prompts: set ruler.samples={rows} or less")


def import_samples(config: RulerConfig, out: Path) -> Path:
    """The prompts as sample files under a key of their own; returns the folder."""
    root = Path(config.prompts)
    pairs = [(length, task) for length in config.lengths for task in config.tasks]
    hashes = {
        f"{n}/{task}": hashlib.sha256(prompt_file(root, n, task).read_bytes()).hexdigest() for n, task in pairs
    }
    folder = keyed_folder(out, "data", {"prompts": hashes})
    for length, task in pairs:
        target = SampleFile(folder, length, task).path
        if not target.is_file():
            path = prompt_file(root, length, task)
            write_lines(target, (asdict(_sample(i, row, path)) for i, row in enumerate(read_lines(path))))
    return folder


def _sample(index: int, row: dict[str, object], path: Path) -> Sample:
    try:
        outputs = row["outputs"] if "outputs" in row else [row["output"]]
        assert isinstance(outputs, list)
        return Sample(
            index,
            str(row["input"]),
            [str(text) for text in outputs],
            int(str(row.get("length", 0))),
            str(row.get("answer_prefix", "")),
            0,
        )
    except (KeyError, AssertionError, ValueError) as error:
        raise UserError(
            f"{path}, line {index + 1}: no RULER sample (needs input, outputs, length): {error}"
        ) from error
