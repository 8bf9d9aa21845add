"""RULER from samples to scores: make them, answer them, score them. Each step resumes where it was killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from conf.errors import UserError
from conf.schema import RulerConfig
from eval.ruler.official import check_prompts, import_samples
from eval.ruler.sample import Sample
from eval.ruler.score import clean, effective_length, mean_score, score_task, weighted_means
from eval.ruler.store import DATA_VERSION, PredictionFile, SampleFile, keyed_folder
from eval.ruler.tasks import OFFICIAL, answer_tokens, check_task, make_sample, make_task
from eval.ruler.template import MODEL_TEMPLATES
from eval.ruler.texts import Texts

Answer = Callable[[list[list[int]], int], list[list[int]]]  # prompts, max_new_tokens -> new tokens of each
Progress = Callable[[str, int, int], None]  # what is being done, done, of how many
CACHED_TOKENS = 262_144  # prompt tokens answered at a time: bounds the KV cache of a batch of long prompts


class Tokens(Protocol):
    """What of a tokenizer is needed here (`data.tokenizer.Tokenizer`)."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Encoder:
    """Prompts as the model sees them: `bos` is put in front if it is not None."""

    tokenizer: Tokens
    bos: int | None = None

    def __call__(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def count(self, text: str) -> int:
        return len(self(text))


def check_config(config: RulerConfig) -> Texts:
    """Refuse what cannot be run, before anything starts; returns the texts that tasks are made from."""
    texts = Texts(config.data)
    if not config.tasks or not config.lengths:
        raise UserError("ruler.tasks and ruler.lengths must not be empty")
    if config.samples < 1:
        raise UserError(f"ruler.samples={config.samples} must be at least 1")
    if config.template not in MODEL_TEMPLATES:
        raise UserError(f"ruler.template={config.template} is unknown; use one of {', '.join(MODEL_TEMPLATES)}")
    if config.prompts:
        if config.data:
            raise UserError("ruler.prompts and ruler.data exclude each other: prompts are read or made")
        check_prompts(config)
    else:
        for task in config.tasks:
            check_task(task, texts)
    return texts


def make_samples(config: RulerConfig, encoder: Encoder, texts: Texts, out: Path, progress: Progress) -> Path:
    """Make the samples that are not there yet below `out`; returns their folder."""
    if config.prompts:
        return import_samples(config, out)
    facts = {
        "version": DATA_VERSION,
        "seed": config.seed,
        "template": config.template,
        "tokenizer": encoder.tokenizer.fingerprint,
        "bos": encoder.bos,
        "words": version("wonderwords"),
        **({"texts": used} if (used := texts.facts(config.tasks)) else {}),
    }
    folder = keyed_folder(out, "data", facts)
    for length, name in _pairs(config):
        task = make_task(name, length, encoder.count, texts)
        file = SampleFile(folder, length, name)
        done, size = file.resume()
        for index in range(done, config.samples):
            sample = make_sample(
                name,
                task,
                index,
                length,
                seed=config.seed,
                count=encoder.count,
                model_template=config.template,
                guess=size,
            )
            file.append(sample)
            size = sample.size
            progress(f"{name} at {length}: samples", index + 1, config.samples)
    return folder


def predict(
    config: RulerConfig,
    encoder: Encoder,
    samples: Path,
    out: Path,
    answer: Answer,
    facts: dict[str, Any],
    progress: Progress,
    batch_size: int,
) -> Path:
    """Answer the samples that have no prediction yet, `batch_size` at a time (fewer if long); returns the folder.

    Args:
        facts: what determines the answers besides the samples: the checkpoint and the attention plans.
    """
    folder = keyed_folder(out, "pred", {**facts, "samples": samples.name})
    for length, name in _pairs(config):
        file = PredictionFile(folder, length, name)
        done = file.resume()
        tokens = answer_tokens(name)
        rows = max(1, min(batch_size, CACHED_TOKENS // length))
        pending = (s for s in SampleFile(samples, length, name).read(config.samples) if s.index not in done)
        for batch in _batches(pending, rows):
            answers = answer([encoder(sample.prompt) for sample in batch], tokens)
            for sample, new in zip(batch, answers, strict=True):
                file.append(sample, encoder.tokenizer.decode(new))
            done |= {sample.index for sample in batch}
            progress(f"{name} at {length}: answers", len(done), config.samples)
    return folder


def score(config: RulerConfig, samples: Path, predictions: Path) -> dict[str, Any]:
    """Scores from the saved predictions alone, as JSON.

    `mean` is over the tasks that were run; it is RULER's own average only when those are all thirteen.
    """
    lengths: dict[str, Any] = {}
    means: dict[int, float] = {}
    for length in sorted(config.lengths):
        scores: dict[str, float] = {}
        empty: dict[str, int] = {}
        filled: dict[str, float] = {}
        for name in config.tasks:
            texts, references = PredictionFile(predictions, length, name).read(config.samples)
            scores[name] = score_task(name, texts, references)
            empty[name] = sum(not clean(text) for text in texts)
            used = [s.length / length for s in SampleFile(samples, length, name).read(config.samples)]
            filled[name] = sum(used) / len(used)
        means[length] = mean_score(scores) or 0.0
        lengths[str(length)] = {"scores": scores, "mean": means[length], "empty": empty, "filled": filled}
    increasing, decreasing = weighted_means(means)
    complete = set(config.tasks) == set(OFFICIAL)
    return {
        "lengths": lengths,
        "mean": mean_score({str(k): v for k, v in means.items()}),
        "weighted_increasing": increasing,
        "weighted_decreasing": decreasing,
        "effective_length": effective_length(means) if complete else None,
        "samples": config.samples,
        "tasks": list(config.tasks),
        "all_tasks": complete,
    }


def run_ruler(
    config: RulerConfig,
    encoder: Encoder,
    out: Path,
    answers: Mapping[str, Answer],
    facts: Mapping[str, dict[str, Any]],
    progress: Progress,
    batch_size: int = 8,
    benchmark: str = "",
) -> dict[str, Any]:
    """All of it for several ways of answering (such as full and MoBA): scores by their names.

    Args:
        out: receives a folder named after the benchmark; `benchmark` overrides that name.
        batch_size: at most so many prompts at a time.
    """
    texts = check_config(config)
    root = out / (benchmark or texts.benchmark)
    samples = make_samples(config, encoder, texts, root, progress)
    results = {}
    for name, answer in answers.items():
        folder = predict(config, encoder, samples, root, answer, facts[name], progress, batch_size)
        results[name] = {**score(config, samples, folder), "predictions": str(folder.relative_to(out))}
    return results


def _pairs(config: RulerConfig) -> Iterator[tuple[int, str]]:
    return ((length, name) for length in sorted(config.lengths) for name in config.tasks)


def _batches(samples: Iterator[Sample], size: int) -> Iterator[Sequence[Sample]]:
    while batch := list(islice(samples, size)):
        yield batch
