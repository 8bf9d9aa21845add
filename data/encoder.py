"""Text -> token ids by a `tokenizers` backend alone, without transformers: quick to start in worker processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Encoder:
    """What tokenising documents needs: a `tokenizers` backend, and the ids that begin and end a document."""

    def __init__(self, backend: Any, eos_id: int, first_id: int | None = None) -> None:
        """`backend`: a `tokenizers.Tokenizer`, owned by this object. `first_id`: begins each document, if any."""
        self.eos_id, self.first_id = eos_id, first_id
        self._backend = backend
        self._backend.encode_special_tokens = True  # text is text, whatever it spells
        self._backend.no_padding()
        self._backend.no_truncation()
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens; texts are spread over the CPU cores."""
        self._backend.encode_special_tokens = True  # transformers' own calls on the backend may have reset it
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_batch`, for texts made by a chat template: control tokens spelt in them count as such."""
        self._backend.encode_special_tokens = False
        try:
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        finally:
            self._backend.encode_special_tokens = True

    @property
    def model_fingerprint(self) -> str:
        """sha256 of the backend's vocabulary, merges, normaliser and pre-tokeniser."""
        return hashlib.sha256(json.dumps(model_state(self._backend), sort_keys=True).encode("utf-8")).hexdigest()


def model_state(backend: Any) -> dict[str, Any]:
    """Of a `tokenizers` backend: what decides which ids a text gets, as plain JSON."""
    state = json.loads(backend.to_str())
    parts = {key: state.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    parts["added"] = sorted((t["id"], t["content"]) for t in state.get("added_tokens", []))
    return parts


def load_encoder(folder: Path, eos_id: int, first_id: int | None = None) -> Encoder:
    """The encoder of a folder written by `Tokenizer.save`, without transformers: seconds faster to start.

    A tokenizer class may do more than its tokenizer.json: compare `model_fingerprint` first.
    """
    from tokenizers import Tokenizer as Backend

    return Encoder(Backend.from_file(str(folder / "tokenizer.json")), eos_id, first_id)
