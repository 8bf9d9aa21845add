"""Text -> tokenizer -> memory-mapped token shards: a set appears complete or not at all.

A prepared set is a folder: `manifest.json`, `tokenizer/`, and for each split (`train`, `heldout`) the shards
`<split>-00000.bin` (uint16 or uint32 tokens; with `.bin.loss` a mask, a byte a token, or weights, fp32),
`<split>-starts.npy` and `<split>-offsets.npy`. Records that could not be used are listed in `skipped.jsonl`, the
files read in `source.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conf.checksums import sha256_file
from conf.domains import trained_whole
from conf.errors import UserError
from conf.schema import DataConfig, ReadConfig, SyntheticConfig, TokenizerConfig
from data.encode import check_encodable
from data.encoder import load_encoder
from data.existing import SKIPPED_FILE, existing, settings_of, warn_if_changed
from data.folder import clear, exclusive_sibling, publish
from data.manifest import MANIFEST_FILE, SPLITS, FileInfo, Manifest, load_manifest, save_manifest
from data.origin import SOURCE_FILE, describe, save_list
from data.parts import Job, Part, clear_records, group, part_bytes
from data.pool import run_parts
from data.readers import read_unit
from data.sources import SourceFile, Unit, cut, hash_order, list_files
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from data.writer import is_heldout, write_split

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
TOKENIZER_FOLDER = "tokenizer"


def prepare(
    out: Path,
    source: str,
    heldout: float,
    tokenizer: TokenizerConfig,
    progress: bool = True,
    *,
    read: ReadConfig | None = None,
    synthetic: SyntheticConfig | None = None,
    workers: int = 0,
) -> Manifest:
    """Tokenise `source` into the folder `out` and return its manifest.

    A complete `out` made with the same settings is returned as it is; a warning tells if the source has changed
    since. A kill at any moment leaves no `out` (or the old state), and the next call goes on with the parts that
    were finished. Concurrent calls wait for each other. The result does not depend on `workers`.

    Args:
        source: see `data.sources`.
        heldout: share of documents for evaluation, 0 <= heldout < 1, chosen by a hash of the name.
        tokenizer: an existing tokenizer, or how to train one (on training documents only).
        workers: processes; 0: one per core, fewer for little text.
    Raises:
        UserError: bad settings, nothing to read, an empty split, or `out` made with other settings.
    """
    if not 0 <= heldout < 1:
        raise UserError(f"heldout={heldout}: must be at least 0 and below 1")
    read, synthetic = read or ReadConfig(), synthetic or SyntheticConfig()
    settings = settings_of(source, heldout, tokenizer, read, synthetic)
    if (ready := existing(out, settings, read)) is not None:
        warn_if_changed(out, source, read, synthetic)
        return ready
    files = list_files(source, read, synthetic)
    _check_records(source, files, read)
    with exclusive_sibling(out) as tmp:
        if (ready := existing(out, settings, read)) is not None:  # another process was faster
            return ready
        units = cut(files, part_bytes(sum(file.bytes for file in files)), read, synthetic)
        _continue_or_clear(tmp, settings | describe(files), units)
        words = _make_tokenizer(units, heldout, tokenizer, read, tmp / TOKENIZER_FOLDER)
        check_encodable(words, read, tokenizer.path)
        dtype = "uint16" if words.vocab_size < 1 << 16 else "uint32"
        folder = tmp / TOKENIZER_FOLDER
        light = load_encoder(folder, words.eos_id).model_fingerprint == words.model_fingerprint
        job = Job(
            tmp, source, folder, heldout, read, synthetic, dtype,
            trained_whole(source, read, synthetic), bool(read.weight), words.eos_id, words.first_id,
            light=light and read.kind != "chat",
        )  # fmt: skip
        groups = group(units, part_bytes(sum(file.bytes for file in files)))
        parts = run_parts(job, groups, words, workers, progress)
        manifest = _finish(job, parts, words, settings, files)
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
        if one.source:
            made = prepare(
                path, one.source, one.heldout, words, progress,
                read=one.read, synthetic=one.synthetic, workers=data.workers,
            )  # fmt: skip
        elif (path / MANIFEST_FILE).is_file():
            made = load_manifest(path)
        else:
            key = f"data.sets.{name}"
            raise UserError(f"{key}.path={path} is no prepared set: run moba prepare, or give {key}.source=FOLDER")
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


def _continue_or_clear(tmp: Path, settings: dict[str, Any], units: list[Unit]) -> None:
    """Keep the finished parts in `tmp` if they are of exactly this work; else begin with an empty folder."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for unit in units:
        digest.update(f"{unit.name}\0{unit.start}\0{unit.stop}\n".encode("utf-8", "surrogateescape"))
    plan = json.dumps({"plan": digest.hexdigest()})
    path = tmp / PLAN_FILE
    if path.is_file() and path.read_text(encoding="utf-8") == plan:
        log.info("%s: going on with what was finished before", tmp)
        return
    clear(tmp)
    path.write_text(plan, encoding="utf-8")


def _check_records(source: str, files: list[SourceFile], read: ReadConfig) -> None:
    if (read.weight or read.kind != "text") and all(f.kind in ("text", "repo", "synthetic") for f in files):
        key = f"weight={read.weight}" if read.weight else f"kind={read.kind}"
        raise UserError(f"read.{key} needs records (JSONL, parquet, arrow or a hub data set); {source} has none")


def _make_tokenizer(
    units: list[Unit],
    heldout: float,
    config: TokenizerConfig,
    read: ReadConfig,
    out: Path,
) -> Tokenizer:
    """Load or train the tokenizer and save it into `out`, unless it is there already."""
    if out.is_dir():
        return load_tokenizer(out)
    partial = out.with_name(f"{out.name}.partial")
    if config.path:
        tokenizer = load_tokenizer(config.path)
        tokenizer.save(partial)
    elif any(unit.file.kind == "synthetic" for unit in units):
        raise UserError(
            "source synthetic needs a tokenizer: give tokenizer.path, as FOLDER/tokenizer of another set"
        )
    elif read.kind == "tokens":
        raise UserError("read.kind=tokens needs the tokenizer that made the ids: give tokenizer.path")
    else:
        tokenizer = train_tokenizer(_sample(units, heldout, config, read), config.train_vocab_size, partial)
    partial.rename(out)
    return tokenizer


def _sample(units: list[Unit], heldout: float, config: TokenizerConfig, read: ReadConfig) -> Iterator[str]:
    left, bad = config.train_chars, list[str]()

    def remember_first(place: str, reason: str) -> None:
        """The parts meet the same records again, and tell."""
        if not bad:
            bad.append(f"{place}: {reason}")

    for unit in hash_order(units):
        for document in read_unit(unit, read, remember_first):
            if left <= 0:
                return
            if not is_heldout(document.name, heldout):
                yield document.plain[:left]
                left -= len(document.plain)
    if left == config.train_chars:
        why = f" (the first bad record: {bad[0]})" if bad else ""
        raise UserError(f"the source has no usable document to train a tokenizer on{why}")


def _finish(
    job: Job, parts: list[Part], tokenizer: Tokenizer, settings: dict[str, Any], sources: list[SourceFile]
) -> Manifest:
    """Index, list of bad records, and the manifest."""
    tmp = job.folder
    skipped: Counter[str] = Counter()
    with (tmp / SKIPPED_FILE).open("w", encoding="utf-8") as skipped_log:
        for place, reason in (record for part in parts for record in part.skipped):
            skipped[reason] += 1
            skipped_log.write(json.dumps({"place": place, "reason": reason}) + "\n")
    if skipped:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(skipped.items()))
        log.warning("%d records skipped (%s); places are in %s", skipped.total(), reasons, SKIPPED_FILE)
    written = {split: write_split(tmp, split, [part.shards[split] for part in parts]) for split in SPLITS}
    splits = {split: info for split, (info, _) in written.items()}
    _check_splits(splits["train"].documents, splits["heldout"].documents, job, skipped.total())
    clear_records(tmp)
    (tmp / PLAN_FILE).unlink()
    save_list(sources, tmp)
    listed = {name: info for _, files in written.values() for name, info in files.items()}
    for path in [tmp / SKIPPED_FILE, tmp / SOURCE_FILE, *sorted((tmp / TOKENIZER_FOLDER).iterdir())]:
        listed[path.relative_to(tmp).as_posix()] = FileInfo(path.stat().st_size, sha256_file(path))
    return Manifest(
        settings, tokenizer.fingerprint, tokenizer.vocab_size, np.dtype(job.dtype).name, splits, dict(skipped),
        listed, masked=job.masked, weighted=job.weighted, source=describe(sources),
    )  # fmt: skip


def _check_splits(train: int, held: int, job: Job, skipped: int) -> None:
    if not train and not held:
        raise UserError(f"source {job.source}: no usable document ({skipped} records skipped)")
    if not train:
        raise UserError(f"heldout={job.heldout} leaves none of {held} documents to train on; lower it")
    if job.heldout and not held:
        raise UserError(f"heldout={job.heldout} holds out none of {train} documents; raise it, or set heldout=0")


def _counts(manifest: Manifest, split: str) -> tuple[int, int]:
    return manifest.splits[split].documents, manifest.splits[split].tokens
