"""RULER samples and predictions on disk, in RULER's own file format.

    <out>/<benchmark>/data-<key>/<length>/<task>/validation.jsonl
        index, input, outputs, length, answer_prefix, size
    <out>/<benchmark>/pred-<key>/<length>/<task>.jsonl
        index, pred, input, outputs, others, truncation, length

A length's folder of predictions is what RULER's own `eval/evaluate.py --data_dir` takes. The benchmark is `ruler`,
`ruler-local` or `needle`.

Every line is on disk before the next is begun, so a killed run goes on behind its last whole line. A key is a
hash of everything that determines the content: what is found under a key is always valid, and the results
of another checkpoint, tokenizer, seed or attention plan have another key and stay untouched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.files import append_line, drop_torn_line, read_lines, write_json
from eval.ruler.sample import Sample

DATA_VERSION = 2  # raise it when a generator changes what it makes for the same seed


def key_of(facts: dict[str, Any]) -> str:
    """A short key for `facts`, which must be plain JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


def keyed_folder(root: Path, kind: str, facts: dict[str, Any]) -> Path:
    """`<root>/<kind>-<key>`, made if need be, with the facts beside the files as `facts.json`."""
    folder = root / f"{kind}-{key_of(facts)}"
    if not (folder / "facts.json").is_file():
        write_json(folder / "facts.json", facts)
    return folder


class SampleFile:
    """The samples of one task and length, index 0, 1, 2, ... in order."""

    def __init__(self, folder: Path, length: int, task: str) -> None:
        self.path = folder / str(length) / task / "validation.jsonl"

    def resume(self) -> tuple[int, int]:
        """How many samples are there, and the haystack size of the last one (0 if none)."""
        drop_torn_line(self.path)
        number, size = 0, 0
        for number, row in enumerate(read_lines(self.path), 1):
            if row["index"] != number - 1:
                raise ValueError(f"{self.path}: line {number} holds index {row['index']}")
            size = row["size"]
        return number, size

    def append(self, sample: Sample) -> None:
        append_line(self.path, asdict(sample))

    def read(self, number: int) -> Iterator[Sample]:
        """The first `number` samples, one at a time: at long lengths a file does not fit into memory."""
        for row in read_lines(self.path):
            if row["index"] >= number:
                return
            yield Sample(**row)


class PredictionFile:
    """The predictions of one task and length, in the order in which they finished."""

    def __init__(self, folder: Path, length: int, task: str) -> None:
        self.path = folder / str(length) / f"{task}.jsonl"

    def resume(self) -> set[int]:
        """Indices that are done."""
        drop_torn_line(self.path)
        return {row["index"] for row in read_lines(self.path)}

    def append(self, sample: Sample, prediction: str) -> None:
        row = {
            "index": sample.index,
            "pred": prediction,
            "input": sample.input,
            "outputs": sample.outputs,
            "others": {"answer_prefix": sample.answer_prefix},
            "truncation": -1,
            "length": sample.length,
        }
        append_line(self.path, row)

    def read(self, number: int) -> tuple[list[str], list[list[str]]]:
        """Predictions and references of the first `number` samples, by index."""
        rows = {r["index"]: (r["pred"], r["outputs"]) for r in read_lines(self.path) if r["index"] < number}
        if sorted(rows) != list(range(number)):
            raise ValueError(f"{self.path} holds {len(rows)} of {number} predictions: generate the others first")
        return [rows[i][0] for i in range(number)], [rows[i][1] for i in range(number)]
