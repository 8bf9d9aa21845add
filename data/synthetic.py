"""Retrieval tasks made up for training, at any length, from no files: needle, multikey, tracking, copy, and two in
the form of RULER's sentences with other words, lookup (needles) and chain (variables).

The random stream of a document depends on (seed, task, length, index) and on a prefix that evaluation (RULER,
`eval.ruler`) never uses; texts, names and keys are built otherwise than there, so that no prompt of an evaluation
can occur here.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from itertools import pairwise

from conf.errors import UserError
from conf.schema import SyntheticConfig
from data.encoder import Encoder
from data.readers import Document
from data.sources import Unit

STREAM = "train"  # the first part of every seed here; evaluation's begin otherwise
FULL = 0.97  # of the length: a document this long is not tried larger again
TRIES = 8
SHORTEST = 64
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_WHO = ("The clerk", "A sailor", "My neighbour", "The old painter", "Nobody", "The night train", "Her brother")
_DOES = ("looked at", "left", "remembered", "walked around", "counted", "drew", "asked about", "passed")
_WHAT = ("the harbour", "a wet field", "three lamps", "the letter", "the stone bridge", "their garden", "the tide")
_KINDS = ("secret", "lucky", "old", "green", "hidden", "royal", "first", "silent", "lost", "winter", "spare")
_PLACES = ("named in the lines above", "given in the text", "found in these lines", "that the text tells us")
_VERBS = ("SET", "LET", "DEF", "NAME", "PUT")
_WHEN = ("before noon", "again", "in silence", "last winter", "for an hour", "on the way home", "without a word")

Draft = tuple[str, str]  # text and answer


def synthetic_documents(unit: Unit, config: SyntheticConfig, tokenizer: Encoder) -> Iterator[Document]:
    """Documents `unit.start` to `unit.stop` of one task and length, each of at most that many tokens in all."""
    task, length = task_of(unit.file.name), length_of(unit.file.name)
    _, _, guess = _fitting(task, length, -1, config.seed, tokenizer, 1)
    for index in range(unit.start, unit.stop):
        text, answer, _ = _fitting(task, length, index, config.seed, tokenizer, guess)
        name = f"{unit.file.name}:{index + 1}"
        answered = config.loss == "answer"
        yield Document(name, text, answer=answer) if answered else Document(name, text + answer)


def sample_rng(seed: int, task: str, length: int, index: int) -> random.Random:
    """The random stream of one document. (String seeds are hashed by SHA-512: stable.)"""
    return random.Random(f"{STREAM}/{seed}/{task}/{length}/{index}")


def draft(task: str, rng: random.Random, size: int) -> Draft:
    """Text and answer with `size` units of hay."""
    return TASKS[task](rng, size)


def check_synthetic(config: SyntheticConfig) -> None:
    """UserError for tasks and lengths that do not exist."""
    unknown = [task for task in config.tasks if task not in TASKS]
    if unknown or not config.tasks:
        raise UserError(f"synthetic.tasks={config.tasks}: choose from {', '.join(TASKS)}")
    if not config.lengths or min(config.lengths) < SHORTEST:
        raise UserError(f"synthetic.lengths={config.lengths}: give lengths of at least {SHORTEST} tokens")


def task_of(name: str) -> str:
    return name.rpartition("-")[0]


def length_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def _fitting(
    task: str, length: int, index: int, seed: int, tokenizer: Encoder, guess: int
) -> tuple[str, str, int]:
    """The largest draft found that fits; `guess` is a size to try first."""
    best: tuple[str, str, int] | None = None
    low, high, size = 0, 0, max(guess, 1)  # sizes known to fit, and not to
    for _ in range(TRIES):
        text, answer = draft(task, sample_rng(seed, task, length, index), size)
        tokens = sum(map(len, tokenizer.encode_batch([text, answer]))) + 1 + (tokenizer.first_id is not None)
        if tokens <= length:
            best, low = (text, answer, size), size
            if tokens >= FULL * length:
                break
        else:
            high = size
        size = int(size * (1 + FULL) / 2 * length / tokens)
        size = max(size, low + 1) if not high else min(max(size, low + 1), high - 1)
        if size == low or size < 1:
            break
    if best is None:
        raise UserError(
            f"synthetic.lengths={length} is too short for {task} with this tokenizer; give a larger one"
        )
    return best


def _word(rng: random.Random, syllables: int = 3) -> str:
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))


def _words(rng: random.Random, count: int) -> list[str]:
    """So many different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(rng, 3 if count < 100_000 else 5)] = None
    return list(found)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**5, 10**6))


def _hay(rng: random.Random) -> str:
    return f"{rng.choice(_WHO)} {rng.choice(_DOES)} {rng.choice(_WHAT)} {rng.choice(_WHEN)}."


def _hide(rng: random.Random, lines: list[str], needles: list[str]) -> list[str]:
    """`needles`, in order, at random places of `lines`."""
    places = sorted(rng.randrange(len(lines) + 1) for _ in needles)
    out: list[str] = []
    for number, line in enumerate([*lines, ""]):
        while places and places[0] == number:
            places.pop(0)
            out.append(needles[len(needles) - len(places) - 1])
        out.append(line)
    return out[:-1]


def _needle(rng: random.Random, size: int) -> Draft:
    key, value = _word(rng), _number(rng)
    lines = _hide(rng, [_hay(rng) for _ in range(size)], [f"The locker of {key} opens with {value}."])
    return "\n".join(lines) + f"\n\nWhich number opens the locker of {key}? It is", f" {value}."


def _multikey(rng: random.Random, size: int) -> Draft:
    pairs = [(key, _number(rng)) for key in _words(rng, size + 1)]
    lines = [f"The locker of {key} opens with {value}." for key, value in pairs]
    key, value = rng.choice(pairs)
    return "\n".join(lines) + f"\n\nWhich number opens the locker of {key}? It is", f" {value}."


def _tracking(rng: random.Random, size: int) -> Draft:
    chains, hops = 2, 3
    names, steps = _words(rng, chains * (hops + 1)), []
    for chain in range(chains):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        steps.append([f"let {own[0]} be {_number(rng)};", *(f"let {b} be {a};" for a, b in pairwise(own))])
    merged = [steps[c].pop(0) for c in rng.sample([0] * (hops + 1) + [1] * (hops + 1), chains * (hops + 1))]
    value = next(line for line in merged if line.startswith(f"let {names[0]} be")).split()[-1].rstrip(";")
    lines = _hide(rng, [_hay(rng) for _ in range(size)], merged)
    question = f"\n\nWhich names stand for {value}? They are"
    return "\n".join(lines) + question, f" {', '.join(names[: hops + 1])}."


def _hayfield(rng: random.Random, size: int) -> list[str]:
    """Lines of hay: the same every time, as RULER's noise, or others."""
    if rng.random() < 0.5:
        return [" ".join(_hay(rng) for _ in range(rng.randint(1, 3)))] * size
    return [_hay(rng) for _ in range(size)]


def _lookup(rng: random.Random, size: int) -> Draft:
    """One to eight of the numbers hidden in hay, or among others: sentences as RULER's, of other words."""
    kind, place = " ".join(rng.sample(_KINDS, 2)), rng.choice(_PLACES)
    count, crowded = min(rng.choice((1, 1, 2, 4, 8)), max(1, size // 2)), rng.random() < 0.4
    keys: dict[str, str] = {}
    while len(keys) < (size if crowded else count):
        number = str(rng.randrange(10**4, 10 ** rng.randint(5, 8)))
        keys.setdefault(f"{_word(rng, 2)}-{_word(rng, 2)}", number)
    needles = [f"One of the {kind} numbers for {key} is: {value}." for key, value in keys.items()]
    lines = needles if crowded else _hide(rng, _hayfield(rng, size), needles)
    asked = rng.sample(list(keys), count)
    text = f"Here and there below stand {kind} numbers, to be remembered.\n" + "\n".join(lines)
    if count == 1:
        what = f"he {kind} number for {asked[0]} {place}"
        return f"{text}\nWhat is t{what}? T{what} is", f" {keys[asked[0]]}."
    what = f"he {kind} numbers for {', '.join(asked[:-1])}, and {asked[-1]} {place}"
    return f"{text}\nWhat are all t{what}? T{what} are", f" {', '.join(f'{key} {keys[key]}' for key in asked)}."


def _chain(rng: random.Random, size: int) -> Draft:
    """The names of one chain of assignments in hay, asked for as RULER does, in other words."""
    verb, hops, value = rng.choice(_VERBS), rng.randint(2, 5), str(rng.randrange(10**4, 10**5))
    names = list(dict.fromkeys("".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(hops + 1)))
    steps = [f"{verb} {names[0]} = {value}", *(f"{verb} {b} = {verb} {a} " for a, b in pairwise(names))]
    lines = _hide(rng, _hayfield(rng, size), steps)
    question = (
        f"\nQuestion: Which names come to the value {value} in these lines? Answer: Going by the chain in these "
    )
    count = f"lines, {len(names)} names come to the value {value}, and they are: "
    return "\n".join(lines) + question + count, f" {' '.join(names)}."


def _copy(rng: random.Random, size: int) -> Draft:
    text = " ".join(_word(rng, rng.randint(1, 4)) for _ in range(size))
    return f"Text:\n{text}\n\nThe same text again:", f"\n{text}\n"


TASKS: dict[str, Callable[[random.Random, int], Draft]] = {
    "needle": _needle,
    "multikey": _multikey,
    "tracking": _tracking,
    "copy": _copy,
    "lookup": _lookup,
    "chain": _chain,
}
