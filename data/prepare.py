"""Text -> tokenizer -> memory-mapped token shards, in one atomic step.

A prepared set is a folder: `manifest.json`, `tokenizer/`, and for each split (`train`, `heldout`) the shards
`<split>-00000.bin` (uint16 or uint32 tokens), `<split>-starts.npy` and `<split>-offsets.npy`. Records that could
not be used are listed in `skipped.jsonl`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.schema import DataConfig, TokenizerConfig
from data.folder import exclusive_sibling, publish
from data.manifest import MANIFEST_FILE, SPLITS, FileInfo, Manifest, load_manifest, save_manifest, sha256_of
from data.sources import Document, SourceFile, hash_order, list_files, read_documents
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from data.writer import SplitWriter, is_heldout

log = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
TOKENIZER_FOLDER = "tokenizer"
_BATCH_CHARS, _BATCH_DOCS = 1 << 20, 512  # one call of the tokenizer


def prepare(out: Path, source: str, heldout: float, tokenizer: TokenizerConfig, progress: bool = True) -> Manifest:
    """Tokenise `source` into the folder `out` and return its manifest.

    A complete `out` made with the same settings is returned as it is. A kill at any moment leaves no `out` (or
    the old state); leftovers are cleared by the next call. Concurrent calls wait for each other.

    Args:
        source: `stdlib`, or a folder or file of text (see `data.sources`).
        heldout: share of documents for evaluation, 0 <= heldout < 1, chosen by a hash of the name.
        tokenizer: an existing tokenizer, or how to train one (on training documents only).
    Raises:
        UserError: bad settings, nothing to read, an empty split, or `out` made with other settings.
    """
    if not 0 <= heldout < 1:
        raise UserError(f"heldout={heldout}: must be at least 0 and below 1")
    settings = _settings(source, heldout, tokenizer)
    if (ready := _existing(out, settings)) is not None:
        return ready
    files = list_files(source)
    with exclusive_sibling(out) as tmp:
        if (ready := _existing(out, settings)) is not None:  # another process was faster
            return ready
        words = _make_tokenizer(files, heldout, tokenizer, tmp / TOKENIZER_FOLDER)
        manifest = _tokenize(files, heldout, words, settings, tmp, progress)
        save_manifest(manifest, tmp)
        publish(tmp, out)
    for split in SPLITS:
        log.info("%s: %s: %d documents, %d tokens", out, split, *_counts(manifest, split))
    return manifest


def prepare_sets(data: DataConfig, progress: bool = True) -> dict[str, Manifest]:
    """Prepare every set of a run that has a source; the others must exist already.

    One run has one tokenizer: without `data.tokenizer.path`, the first set trains it and the others reuse it.
    """
    manifests: dict[str, Manifest] = {}
    words = data.tokenizer
    for name, one in data.sets.items():
        path = Path(one.path)
        if not one.source and not (path / MANIFEST_FILE).is_file():
            key = f"data.sets.{name}"
            raise UserError(f"{key}.path={path} is no prepared set: run moba prepare, or give {key}.source=FOLDER")
        made = prepare(path, one.source, one.heldout, words, progress) if one.source else load_manifest(path)
        manifests[name] = made
        if not words.path:
            words = TokenizerConfig(path=str(path / TOKENIZER_FOLDER))
        first_name, first = next(iter(manifests.items()))
        if made.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(
                f"data.sets.{name} and data.sets.{first_name} were made with different tokenizers; prepare one of "
                f"them anew with tokenizer.path={Path(data.sets[first_name].path) / TOKENIZER_FOLDER}"
            )
    return manifests


def _settings(source: str, heldout: float, tokenizer: TokenizerConfig) -> dict[str, Any]:
    if tokenizer.path:
        return {"source": source, "heldout": heldout, "tokenizer.path": tokenizer.path}
    return {
        "source": source,
        "heldout": heldout,
        "tokenizer.train_vocab_size": tokenizer.train_vocab_size,
        "tokenizer.train_chars": tokenizer.train_chars,
    }


def _existing(out: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a complete `out`; None if there is nothing yet. UserError if `out` is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(f"{out} exists and is not a prepared data set; choose another `out`")
    manifest = load_manifest(out)
    keys = sorted(settings.keys() | manifest.settings.keys())
    differ = [
        f"{key} was {manifest.settings.get(key, 'not given')}, now {settings.get(key, 'not given')}"
        for key in keys
        if settings.get(key) != manifest.settings.get(key)
    ]
    if differ:
        raise UserError(f"{out} was prepared with other settings ({'; '.join(differ)}); choose another `out`")
    return manifest


def _make_tokenizer(files: list[SourceFile], heldout: float, config: TokenizerConfig, out: Path) -> Tokenizer:
    """Load or train the tokenizer and save it into `out`."""
    if config.path:
        tokenizer = load_tokenizer(config.path)
        tokenizer.save(out)
        return tokenizer

    def sample() -> Iterator[str]:
        left = config.train_chars

        def told_later(place: str, reason: str) -> None:
            """Nothing: `_tokenize` meets the same records again."""

        for document in read_documents(hash_order(files), on_bad=told_later):
            if left <= 0:
                return
            if not is_heldout(document.name, heldout):
                yield document.text[:left]
                left -= len(document.text)

    return train_tokenizer(sample(), config.train_vocab_size, out)


def _tokenize(
    files: list[SourceFile],
    heldout: float,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    tmp: Path,
    progress: bool,
) -> Manifest:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 1 << 16 else np.uint32)
    writers = {split: SplitWriter(tmp, split, dtype) for split in SPLITS}
    skipped: Counter[str] = Counter()
    try:
        with (tmp / SKIPPED_FILE).open("w", encoding="utf-8") as skipped_log:

            def on_bad(place: str, reason: str) -> None:
                skipped[reason] += 1
                skipped_log.write(json.dumps({"place": place, "reason": reason}) + "\n")

            documents = read_documents(files, on_bad)
            for document, ids in _encoded(documents, tokenizer, _total_bytes(files), progress):
                split = "heldout" if is_heldout(document.name, heldout) else "train"
                writers[split].add(document.name, [*ids, tokenizer.eos_id])
        splits = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    if skipped:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(skipped.items()))
        log.warning("%d records skipped (%s); places are in %s", skipped.total(), reasons, SKIPPED_FILE)
    if not any(split.documents for split in splits.values()):
        raise UserError(f"source {settings['source']}: no usable document ({skipped.total()} records skipped)")
    if not splits["train"].documents:
        raise UserError(
            f"heldout={heldout} leaves none of {splits['heldout'].documents} documents to train on; lower it"
        )
    if heldout and not splits["heldout"].documents:
        count = splits["train"].documents
        raise UserError(f"heldout={heldout} holds out none of {count} documents; raise it, or set heldout=0")
    listed = {info: one for writer in writers.values() for info, one in writer.files.items()}
    for path in [tmp / SKIPPED_FILE, *sorted((tmp / TOKENIZER_FOLDER).iterdir())]:
        listed[path.relative_to(tmp).as_posix()] = FileInfo(path.stat().st_size, sha256_of(path))
    return Manifest(
        settings, tokenizer.fingerprint, tokenizer.vocab_size, dtype.name, splits, dict(skipped), listed
    )


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, total_bytes: int, progress: bool
) -> Iterator[tuple[Document, list[int]]]:
    """Documents with their tokens, encoded in batches, under a progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        TextColumn("{task.fields[documents]} documents, {task.fields[tokens]} tokens, {task.fields[rate]:,.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=total_bytes, documents=0, tokens=0, rate=0.0)
        num_docs = num_tokens = 0
        start = time.monotonic()
        for batch in _batches(documents):
            all_ids = tokenizer.encode_batch([document.text for document in batch])
            yield from zip(batch, all_ids, strict=True)
            num_docs += len(batch)
            num_tokens += sum(map(len, all_ids))
            done = sum(len(document.text.encode("utf-8")) for document in batch)
            rate = num_tokens / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=done, documents=num_docs, tokens=num_tokens, rate=rate)
        bar.update(task, completed=total_bytes)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _total_bytes(files: list[SourceFile]) -> int:
    return sum(file.path.stat().st_size for file in files)


def _counts(manifest: Manifest, split: str) -> tuple[int, int]:
    return manifest.splits[split].documents, manifest.splits[split].tokens
