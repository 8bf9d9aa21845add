"""Conversations -> text with the places where loss is taken, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conf.errors import UserError
from data.readers import Message

# Written beside tokenizers trained here. The eos token ends each answer, so that generation stops there.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nassistant:\\n' }}{% endif %}"
)

Segment = tuple[str, float]  # text, and its weight in the loss: 0 for prompts


class ChatError(ValueError):
    """A conversation that the template cannot express."""


def check_template(hf: Any, where: str) -> None:
    """UserError unless the transformers tokenizer `hf` has a chat template."""
    if not getattr(hf, "chat_template", None):
        raise UserError(
            f"tokenizer {where} has no chat template, which read.kind=chat needs: add chat_template.jinja to its "
            "folder, or take the tokenizer of a chat model"
        )


def segments(hf: Any, messages: Sequence[Message], weights: Sequence[float] = ()) -> list[Segment]:
    """The rendered conversation in turn: a prompt (no loss), an answer of the assistant (loss), a prompt, ...
    `weights`: of each message in the loss; empty: 1.

    An answer is what the template adds for it after its generation prompt, end-of-turn marks included. What
    follows the last answer is left out: nothing would be learnt from it. Concatenated, the texts are exactly the
    rendering of the conversation.

    Raises:
        ChatError: a message spells a control token; the template refuses the conversation (roles that do not
            alternate, ...) or rewrites earlier turns when later ones come.
    """
    _check_content(hf, messages)
    done, parts = "", []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(hf, messages[:index], True)
        whole = _render(hf, messages[: index + 1], False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise ChatError("the chat template does not keep earlier turns as they are")
        parts += [(prompt[len(done) :], 0.0), (whole[len(prompt) :], weights[index] if weights else 1.0)]
        done = whole
    return parts


def _render(hf: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return hf.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ChatError(f"chat template: {error}") from error
    except (IndexError, KeyError, TypeError, ValueError) as error:  # templates that index what is not there
        raise ChatError(f"chat template: {type(error).__name__}") from error


def _check_content(hf: Any, messages: Sequence[Message]) -> None:
    """In a rendered text, control tokens count as such: those of a user's text must not."""
    for message in messages:
        for token in hf.all_special_tokens:
            if token in message["content"]:
                raise ChatError(f"a message spells the control token {token}")
