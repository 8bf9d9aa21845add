"""Our engine behind lm-eval's model interface. Token handling is that of lm-eval's own `hf` model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.schema import GenerateConfig
from eval.load import Loaded
from eval.row_scores import score_rows
from model.schedule import LayerPlan, describe

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

MAX_GENERATED = 256  # tokens, where a task names no number; as in lm-eval


@dataclass(frozen=True)
class Request:
    """A prompt to continue: its place among the requests, and when to stop."""

    number: int
    text: str
    stops: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class Engine:
    """What lm-eval asks of a model.

    Attributes:
        plans: for prompts and scored text; `decode_plans` for generated tokens.
        max_length: tokens of prompt and answer; longer prompts lose their oldest tokens.
    """

    loaded: Loaded
    plans: Sequence[LayerPlan]
    decode_plans: Sequence[LayerPlan]
    settings: GenerateConfig
    max_length: int

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which every token is scored."""
        bos = self.loaded.tokenizer.hf.bos_token_id
        return self.loaded.tokenizer.eos_id if bos is None else int(bos)

    def encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """As `hf`: the tokenizer's own special tokens, but never a second BOS."""
        tokenizer = self.loaded.tokenizer.hf
        if add_special_tokens is None and string.startswith(tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        kinds = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(tokenizer.encode(string, **kinds))

    def loglikelihoods(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of each answer's tokens after its context, and whether they are the most likely."""
        rows = [((context + answer)[-(self.max_length + 1) :], len(answer)) for _, context, answer in requests]
        return score_rows(self.loaded, self.plans, rows)

    def rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap in what they score."""
        from lm_eval import utils

        rows, owners = [], []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, answer in map(utils.make_disjoint_window, windows):
                rows.append((context + answer, len(answer)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, score_rows(self.loaded, self.plans, rows), strict=True):
            sums[number] += value
        return sums

    def continuations(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, up to a stop string or the task's number of tokens."""
        from lm_eval.models.utils import postprocess_generated_text

        tokenizer = self.loaded.tokenizer.hf
        asked = sorted(self._asked(requests), key=lambda r: (r.stops, r.tokens, len(r.text)))
        texts = [""] * len(requests)
        for batch in _alike(asked, self.settings.batch):
            stops, tokens = batch[0].stops, batch[0].tokens
            if tokens >= self.max_length:
                raise UserError(
                    f"{tokens} tokens are to be generated: set lm_eval.max_length above {self.max_length}"
                )
            answers = self.loaded.generate(
                [self.encode(request.text)[-(self.max_length - tokens) :] for request in batch],
                max_new_tokens=tokens,
                eos_id=self.loaded.tokenizer.end_ids,
                prefill_plans=self.plans,
                decode_plans=self.decode_plans,
                chunk=self.settings.chunk,
                ended=_stops_at(tokenizer, stops),
                share=describe(tuple(self.plans)) if self.settings.share else "",
            )
            for request, new in zip(batch, answers, strict=True):
                text = tokenizer.decode(new, skip_special_tokens=True)
                texts[request.number] = postprocess_generated_text(text, list(stops), None)
        return texts

    def _asked(self, requests: Sequence[Any]) -> list[Request]:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        end = self.loaded.tokenizer.hf.decode(self.loaded.tokenizer.eos_id)
        asked = []
        for number, request in enumerate(requests):
            kinds = normalize_gen_kwargs(request.args[1], MAX_GENERATED)
            if kinds.get("do_sample"):
                raise UserError("lm-eval asks for sampling; only greedy generation is implemented")
            stops = tuple(handle_stop_sequences(kinds.get("until"), eos=end))
            asked.append(Request(number, request.args[0], stops, int(kinds["max_gen_toks"])))
        return asked


def harness_model(engine: Engine) -> TemplateLM:
    """The engine as lm-eval wants it. A function, so that lm-eval is imported only where it is used."""
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = engine.loaded.tokenizer.hf
            self.max_length, self.max_gen_toks = engine.max_length, MAX_GENERATED

        @property
        def eot_token_id(self) -> int:
            return engine.loaded.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return engine.prefix_token_id

        @property
        def tokenizer_name(self) -> str:
            return engine.loaded.tokenizer.fingerprint

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return engine.encode(string, add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            return engine.loglikelihoods(requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return engine.rolling(requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return engine.continuations(requests)

    return Model()


def _stops_at(tokenizer: Any, stops: Sequence[str]) -> Callable[[list[int]], bool]:
    longest = max(map(len, stops), default=0)

    def ended(new: list[int]) -> bool:
        tail = tokenizer.decode(new[-longest - 8 :])  # a token is at least a byte; some room for cut characters
        return any(stop in tail for stop in stops if stop)

    return ended


def _alike(asked: Sequence[Request], size: int) -> list[list[Request]]:
    """Batches of at most `size` requests with the same stops and budget."""
    batches: list[list[Request]] = []
    for item in asked:
        first = batches[-1][0] if batches else None
        if first is None or len(batches[-1]) == size or (first.stops, first.tokens) != (item.stops, item.tokens):
            batches.append([])
        batches[-1].append(item)
    return batches
