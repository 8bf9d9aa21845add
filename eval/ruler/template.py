"""RULER's texts: task prompts, answer prefixes, budgets and model templates, letter by letter.

Source: NVIDIA RULER v1, `scripts/data/synthetic/constants.py` and `scripts/data/template.py`; the texts are
Copyright (c) 2024 NVIDIA CORPORATION, Apache License 2.0. Model templates that need control tokens are left out:
here a prompt is plain text.
A prompt is the model template around the task text, followed by the answer prefix: the prefix begins the
answer, after the assistant header, for base and chat models alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."

MODEL_TEMPLATES = {
    "base": "{task_template}",
    "meta-chat": "[INST] {task_template} [/INST]",
    "vicuna-chat": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: {task_template} ASSISTANT:"
    ),
    "lwm-chat": "You are a helpful assistant. USER: {task_template} ASSISTANT: ",
}


@dataclass(frozen=True)
class TaskText:
    """Fixed texts of a task family. `tokens` is the generation budget."""

    template: str
    answer_prefix: str
    tokens: int


NIAH = TaskText(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
    128,
)
VARIABLE_TRACKING = TaskText(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
    "assigned the value {query}, they are: ",
    30,
)
COMMON_WORDS = TaskText(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT_WORDS = TaskText(
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
QUESTION_ANSWERING = TaskText(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {query}",
    " Answer:",
    32,
)


def singular(text: str) -> str:
    """RULER's rewrite of the needle texts when one value of one key is asked for."""
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")


def fill(text: str, **values: str) -> str:
    """`str.format` for named fields only; braces inside the values stay as they are."""
    return text.format(**values)


def wrap(task_text: str, model_template: str) -> str:
    """The task text inside a model template named in `MODEL_TEMPLATES`."""
    if model_template not in MODEL_TEMPLATES:
        raise UserError(f"ruler.template={model_template} is unknown; use one of {', '.join(MODEL_TEMPLATES)}")
    before, after = MODEL_TEMPLATES[model_template].split("{task_template}")
    return before + task_text + after
