"""The prepared sets of a study, made when they are not there: text, and from it conversations and retrieval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.schema import ReadConfig, StudyConfig, SyntheticConfig, TokenizerConfig
from launch.study.places import Places, used_sets
from launch.study.plan import Plan

TEXT = "text.json"
HELDOUT = 0.15  # share of documents
TRAIN_CHARS = 12_000_000  # of text that the tokenizer is trained on


def ensure_sets(plan: Plan, config: StudyConfig, places: Places, values: dict[str, Any]) -> None:
    """Build the text and prepare every set that the plan's groups use. Sets that exist are used as they are."""
    from data.manifest import MANIFEST_FILE

    needed = [name for group in plan.groups.values() for name in used_sets(group)]
    missing = [
        name for name in dict.fromkeys(["text", *needed]) if not (places.data / name / MANIFEST_FILE).is_file()
    ]
    if not missing:
        return
    from data.prepare import prepare

    text = places.data / "source"
    if "text" in missing or "chat" in missing:
        _ensure_text(text, config, values)
    tokenizer = TokenizerConfig(train_vocab_size=int(values["vocab_size"]), train_chars=TRAIN_CHARS)
    if "text" in missing:
        prepare(places.data / "text", str(text), HELDOUT, tokenizer, read=ReadConfig(repos=1))
    own = TokenizerConfig(path=str(places.data / "text" / "tokenizer"))
    if "chat" in missing:
        from launch.study.chats import write_chats

        chats = places.data / "chats.jsonl"
        write_chats(text, chats, int(values["chat_chars"]), HELDOUT, int(values["chat_documents"]))
        prepare(places.data / "chat", str(chats), HELDOUT, own, read=ReadConfig(kind="chat"))
    for name in missing:
        if name.startswith("synthetic"):
            prepare(places.data / name, "synthetic", HELDOUT, own, synthetic=SyntheticConfig(**values[name]))


def describe_text(places: Places) -> None:
    """`text.json` in the results: what the text is made of and how it was split, if the data folder says."""
    from data.manifest import load_manifest
    from eval.files import write_json
    from launch.study.corpus import ABOUT

    about = places.data / f"source-{ABOUT}"
    if not about.is_file() or (places.out / TEXT).is_file():
        return
    manifest = load_manifest(places.data / "text")
    splits = {name: {"documents": one.documents, "tokens": one.tokens} for name, one in manifest.splits.items()}
    facts = json.loads(about.read_text(encoding="utf-8"))
    write_json(places.out / TEXT, {**facts, "vocab_size": manifest.vocab_size, "splits": splits})


def _ensure_text(folder: Path, config: StudyConfig, values: dict[str, Any]) -> None:
    from launch.study.corpus import LONG, MEDIUM, build_corpus, default_roots

    if not folder.is_dir():
        roots = [Path(root) for root in config.text] or default_roots()
        print(f"{folder}: collecting text", flush=True)
        sizes = tuple(values.get("document_chars", (LONG, MEDIUM)))
        build_corpus(folder, roots, int(values["chars"]), sizes)
