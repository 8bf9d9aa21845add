"""Tokenizers: one wrapper over Hugging Face fast tokenizers, and training of a new one with sentencepiece.

Text never turns into control tokens: a document that contains the characters `</s>` gives ordinary tokens, so
nobody's file can end a document early. `decode(encode(text)) == text` holds for trained tokenizers, for
every string: no normalisation, no added or removed whitespace, bytes as a fallback for rare characters.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conf.constants import GENERATION_FILE
from conf.errors import UserError
from data.encoder import Encoder, model_state

SENTENCEPIECE_FILE = "tokenizer.model"

# Words for training (sentencepiece's own splitting knows only spaces). A run of whitespace is a word of its
# own, a single space belongs to what follows, line ends belong to the punctuation before them, digits stay
# single. Tabs cannot be part of a sentencepiece token: they are always one byte token.
_LETTER = "A-Za-z_\u0080-\U0010ffff"
_PUNCT = f"[^ \n\r\t0-9{_LETTER}]"
_WORD = re.compile(f"[0-9]| ?{_PUNCT}*[{_LETTER}]+| ?{_PUNCT}+[\n\r]*|[ \n\r]+")
_PROBES = (
    "def f(x):\n        return x  # ok\r\n\n\n\tif a == 'b': print(\"12345\")",
    "  leading, trailing  ",
    "a",
    "naïve café, Ⅷ ﬁ Å 日本語 🙂👩‍👩‍👧",
)


class Tokenizer(Encoder):
    """A Hugging Face fast tokenizer with the few calls the project needs. Ids are plain ints."""

    def __init__(self, hf: Any, where: str, files: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """`hf`: a transformers fast tokenizer, owned by this object. `where`: its origin, for messages. `files`:
        what else travels with it, by name.

        Raises UserError if it is not a fast tokenizer or has no end-of-sequence token.
        """
        if not getattr(hf, "is_fast", False):
            raise UserError(f"{where}: not a fast tokenizer (tokenizer.json); convert it with transformers first")
        if hf.eos_token_id is None:
            raise UserError(f"{where}: has no eos token, which ends every document; set eos_token in its config")
        bos = None if hf.bos_token_id is None else int(hf.bos_token_id)
        # Llama's and Mistral's put bos in front of every text: their models have seen no document without it.
        first = bos if hf("a")["input_ids"][:1] == [bos] else None
        super().__init__(hf.backend_tokenizer, int(hf.eos_token_id), first)
        self.hf = hf
        self.bos_id: int | None = bos
        self._files = files

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control tokens (bos, eos, ...) have no text."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: eos, and those of generation_config.json; chat models have several."""
        try:
            found = json.loads(self._files.get(GENERATION_FILE, b"{}")).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError):  # damaged: eos is what is certain
            found = None
        listed = found if isinstance(found, list) else [found]
        more = {i for i in listed if isinstance(i, int) and 0 <= i < self.vocab_size}
        return [self.eos_id, *sorted(more - {self.eos_id})]

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text gets; survives saving and loading."""
        parts = model_state(self._backend) | {"special": [self.bos_id, self.eos_id]}
        if self.first_id is not None:
            parts["first"] = self.first_id
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()

    def save(self, folder: Path) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads without remote code."""
        folder.mkdir(parents=True, exist_ok=True)
        self.hf.save_pretrained(str(folder))
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":  # the same class by its name in every version
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face tokenizer folder or a sentencepiece `.model` file. Local paths only.

    Raises UserError if nothing loadable is there, or if a `.model` has settings that a fast tokenizer
    would not reproduce exactly.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".model":
        blob = path.read_bytes()
        return Tokenizer(_fast_from_sentencepiece(blob, str(path)), str(path), {SENTENCEPIECE_FILE: blob})
    if not path.is_dir():
        raise UserError(f"tokenizer {path}: no such folder or sentencepiece .model file")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer passes over what the folder says for some model types (qwen2), and builds another tokenizer.
    plain = _tokenizer_class(path) in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader = PreTrainedTokenizerFast if plain and (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        hf = loader.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types; each means "this folder does not load"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer {path}: transformers cannot load it: {reason}") from error
    beside = (path / name for name in (SENTENCEPIECE_FILE, GENERATION_FILE))
    return Tokenizer(hf, str(path), {file.name: file.read_bytes() for file in beside if file.is_file()})


def _tokenizer_class(folder: Path) -> str:
    """What tokenizer_config.json names; empty if nothing."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return str(found.get("tokenizer_class", ""))
    except (OSError, ValueError, AttributeError, RecursionError):  # transformers says better what is wrong
        return ""


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> Tokenizer:
    """Train a sentencepiece BPE tokenizer with byte fallback and save it to the folder `out`.

    The same texts give the same file: training runs in one thread over sorted word counts.
    Raises UserError if the texts are too few for `vocab_size` tokens.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    blob = _train_sentencepiece(counts, vocab_size)
    from data.chat import PLAIN_TEMPLATE

    where = "the trained tokenizer"
    tokenizer = Tokenizer(_fast_from_sentencepiece(blob, where), where, {SENTENCEPIECE_FILE: blob})
    tokenizer.hf.chat_template = PLAIN_TEMPLATE
    tokenizer.save(out)
    return tokenizer


def _train_sentencepiece(counts: Counter[str], vocab_size: int) -> bytes:
    import sentencepiece

    # NUL ends a sentence for sentencepiece, U+2581 is its sign for a space: both stay byte tokens.
    words = (f"{word}\t{n}" for word, n in sorted(counts.items()) if "\0" not in word and "\u2581" not in word)
    model = io.BytesIO()  # not a file: sentencepiece would write its path into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words,
            input_format="tsv",  # word, tab, count
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentencepiece_length=24,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=False,  # the words are made above
            split_by_number=False,
            split_by_unicode_script=False,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip().rstrip(".") or "no words"
        raise UserError(
            f"tokenizer.train_vocab_size={vocab_size} does not suit {sum(counts.values())} words of text "
            f"({reason}); give more text or another size"
        ) from error
    blob = model.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=blob)
    if processor.vocab_size() != vocab_size:
        raise UserError(
            f"tokenizer.train_vocab_size={vocab_size}: the text yields only {processor.vocab_size()} tokens; "
            "give more text or a smaller size"
        )
    return blob


def _fast_from_sentencepiece(blob: bytes, where: str) -> Any:
    """The same BPE as a Hugging Face fast tokenizer, checked against sentencepiece on a few probes.

    The vocabulary spells a space as a space (not as U+2581), so no normaliser is needed: this is faster, and
    a literal U+2581 in a text survives, which sentencepiece itself would turn into a space.
    """
    import sentencepiece
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=blob)
    except RuntimeError as error:
        raise UserError(f"{where}: not a sentencepiece model") from error
    special = {name: i for name in ("unk", "bos", "eos") if (i := getattr(processor, f"{name}_id")()) >= 0}
    vocab: dict[str, int] = {}
    pieces: list[tuple[float, str]] = []
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i)):
            piece = piece.replace("\u2581", " ")
            if len(piece) > 1:
                pieces.append((-processor.get_score(i), piece))
        vocab[piece] = i
    pieces.sort(key=lambda item: item[0])  # stable: equal scores stay in order of id
    merges = [pair for _, piece in pieces for pair in _splits(piece, vocab)]
    unk = processor.id_to_piece(special["unk"])
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token=unk, fuse_unk=False))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for probe in _PROBES:
        if backend.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            raise UserError(
                f"{where}: only BPE models with byte fallback, identity normalisation and no dummy prefix can be "
                "used as they are; convert it to a Hugging Face tokenizer folder with transformers and give that"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": processor.id_to_piece(i) for name, i in special.items()},
    )


def _splits(piece: str, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """All ways to make `piece` of two tokens: sentencepiece merges any pair whose union is a token."""
    for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in vocab and right in vocab:
            yield left, right
