"""Documents -> token ids with the places where loss is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conf.schema import ReadConfig
from data.chat import ChatError, Segment, check_template, segments
from data.encoder import Encoder
from data.readers import Document, OnBad
from data.tokenizer import Tokenizer

BATCH_CHARS, BATCH_DOCS = 1 << 20, 512  # one call of the tokenizer


@dataclass(frozen=True)
class Encoded:
    """One document. `ids` [n] begins as the tokenizer begins texts (Llama's bos) and ends in eos, given ids and
    conversations as they are; `loss` fp32 [n]: weight of the token as a target, None for 1."""

    name: str
    ids: np.ndarray
    loss: np.ndarray | None


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches for the tokenizer, in order."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += document.size
        if chars >= BATCH_CHARS or len(batch) >= BATCH_DOCS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encode(
    documents: Sequence[Document], tokenizer: Encoder, read: ReadConfig, masked: bool, on_bad: OnBad
) -> Iterator[Encoded]:
    """The documents, in order; what the chat template refuses, and unknown token ids, go to `on_bad`.

    `masked`: parts of the documents are no targets.
    """
    eos, first = tokenizer.eos_id, [] if tokenizer.first_id is None else [tokenizer.first_id]
    if read.kind == "tokens":
        for document in documents:
            if document.ids is not None and int(document.ids.max()) < tokenizer.vocab_size:
                yield _with_eos(document, document.ids, eos)
            else:
                on_bad(document.name, "a token id that the tokenizer does not have")
        return
    if not masked:
        for document, ids in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
            whole = np.array([*first, *ids, eos])
            weights = np.full(len(whole), document.weights[0], np.float32) if document.weights else None
            yield Encoded(document.name, whole, weights)
        return
    chat = read.kind == "chat"
    parts: list[list[Segment]] = []
    kept: list[Document] = []
    for document in documents:
        try:
            parts.append(_segments(document, tokenizer))
            kept.append(document)
        except ChatError as error:
            on_bad(document.name, str(error))
    texts = [text for one in parts for text, _ in one]
    all_ids = iter(tokenizer.encode_rendered(texts) if chat else tokenizer.encode_batch(texts))
    for document, one in zip(kept, parts, strict=True):
        pieces = [] if chat else [(first, 0.0)]  # a chat template has its own
        pieces += [(next(all_ids), loss) for _, loss in one]
        ids = [i for piece, _ in pieces for i in piece]
        loss = [on for piece, on in pieces for _ in piece]
        if ids[-1] != eos:  # a template's own end of turn teaches where to stop; else the end of text does
            ids.append(eos)
            loss.append(0.0 if chat else 1.0)
        yield Encoded(document.name, np.array(ids), np.array(loss, dtype=np.float32))


def _with_eos(document: Document, ids: np.ndarray, eos: int) -> Encoded:
    """Ids that were given. An eos that was not among them is no target, unless all of the document is."""
    whole = ids if ids[-1] == eos else np.append(ids, eos)
    given = document.weights
    if not given:
        return Encoded(document.name, whole, None)
    weights = np.full(len(whole), given[0] if len(given) == 1 else 0, dtype=np.float32)
    if len(given) > 1:
        weights[: len(given)] = given
    return Encoded(document.name, whole, weights)


def _segments(document: Document, tokenizer: Encoder) -> list[Segment]:
    if document.messages:
        assert isinstance(tokenizer, Tokenizer)  # see `data.parts.Job.light`
        return segments(tokenizer.hf, document.messages, document.weights)
    return [(document.text, 0.0), (document.answer, 1.0)]


def check_encodable(tokenizer: Tokenizer, read: ReadConfig, where: str) -> None:
    """UserError if the tokenizer lacks what the source needs."""
    if read.kind == "chat":
        check_template(tokenizer.hf, where)
