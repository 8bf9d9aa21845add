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
    """One document. `ids` [n] ends in eos; `loss` bool [n]: whether the token is a target, None for all."""

    name: str
    ids: np.ndarray
    loss: np.ndarray | None


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches for the tokenizer, in order."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.plain)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_DOCS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encode(
    documents: Sequence[Document], tokenizer: Encoder, read: ReadConfig, masked: bool, on_bad: OnBad
) -> Iterator[Encoded]:
    """The documents, in order; what the chat template refuses goes to `on_bad`.

    `masked`: the set has a loss mask, and every document gets one.
    """
    eos = tokenizer.eos_id
    if not masked:
        for document, ids in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
            yield Encoded(document.name, np.array([*ids, eos]), None)
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
        pieces = [(next(all_ids), loss) for _, loss in one]
        ids = [i for piece, _ in pieces for i in piece]
        loss = [on for piece, on in pieces for _ in piece]
        if ids[-1] != eos:  # a template's own end of turn teaches where to stop; else the end of text does
            ids.append(eos)
            loss.append(not chat)
        yield Encoded(document.name, np.array(ids), np.array(loss))


def _segments(document: Document, tokenizer: Encoder) -> list[Segment]:
    if document.messages:
        assert isinstance(tokenizer, Tokenizer)  # see `data.parts.Job.light`
        return segments(tokenizer.hf, document.messages)
    return [(document.text, False), (document.answer, True)]


def check_encodable(tokenizer: Tokenizer, read: ReadConfig, where: str) -> None:
    """UserError if the tokenizer lacks what the source needs."""
    if read.kind == "chat":
        check_template(tokenizer.hf, where)
