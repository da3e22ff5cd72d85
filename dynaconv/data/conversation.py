"""Conversations: their canonical JSON, and their tokens by the tokenizer's chat template, answers marked.

Only what the assistant says is to be learnt. Where the template marks it with ``{% generation %}``, transformers tells
which tokens those are. Otherwise an answer is what the template adds when its message is appended to the messages
before it. Some templates rewrite earlier turns once later ones follow (they drop thoughts, say); then every answer
becomes a sample of its own, rendered as the model would have seen it when it was to give that answer.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from dynaconv.errors import DataError

_MARKED = re.compile(r"\{%-?\s*generation\b")
_ANSWERS = "assistant"


class Sample(NamedTuple):
    """Token ids of a conversation, and which of them belong to an answer."""

    ids: list[int]
    scored: list[bool]


def canonical(messages: Any, where: str) -> str:
    """JSON of ``messages``, the same whatever file they were read from: null members left out, role and content first.

    Raises:
        DataError: This is no list of messages with a role each.
    """
    shape = 'a list of messages such as {"role": "user", "content": "..."}'
    if not isinstance(messages, list):
        raise DataError("this is no conversation", where=where, expected=shape, found=type(messages).__name__)
    kept = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            found = ", ".join(sorted(map(str, message))) if isinstance(message, dict) else type(message).__name__
            raise DataError("a message has no role", where=where, expected=shape, found=found or "an empty message")
        names = ["role", "content", *sorted(set(message) - {"role", "content"})]
        kept.append({name: message[name] for name in names if message.get(name) is not None})
    try:
        return json.dumps(kept, ensure_ascii=False)
    except TypeError as error:
        raise DataError("a message holds something that is not text", where=where, found=error) from error


def require_template(tokenizer: Any) -> None:
    """Refuses a tokenizer that cannot render a conversation or cannot tell where its tokens come from.

    Raises:
        DataError: It has no chat template, or is not a fast one.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template",
            where="data.chat",
            hint="put chat_template.jinja beside the checkpoint's tokenizer, or read a text field: data.chat=null",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("conversations need a fast tokenizer", where="data.chat", found=type(tokenizer).__name__)


def encode(tokenizer: Any, text: str, where: str) -> list[Sample]:
    """The samples of one conversation, none where it has no answer.

    Args:
        tokenizer: One that :func:`require_template` lets pass.
        text: What :func:`canonical` gave.
        where: The conversation's name, for messages.

    Raises:
        DataError: The template refuses the conversation, or does not say where an answer begins.
    """
    messages = json.loads(text)
    try:
        if _MARKED.search(tokenizer.get_chat_template()):
            marked = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
            found = [Sample(list(marked["input_ids"]), [bool(mask) for mask in marked["assistant_masks"]])]
        else:
            found = _by_prefix(tokenizer, messages)
    except Exception as error:  # templates are programs: they raise what they like
        raise DataError(
            "the chat template cannot render a conversation",
            where=where,
            found=f"{type(error).__name__}: {error}",
            hint="check its roles and their order against the tokenizer's template",
        ) from error
    return [sample for sample in found if any(sample.scored)]


def _by_prefix(tokenizer: Any, messages: list[Any]) -> list[Sample]:
    answers = [i for i, message in enumerate(messages) if i and message["role"] == _ANSWERS]
    whole = _render(tokenizer, messages)
    through = [_render(tokenizer, messages[: i + 1]) for i in answers]
    spans = [(_beginning(tokenizer, messages[:i], text), len(text)) for i, text in zip(answers, through, strict=True)]
    if all(whole.startswith(text) for text in through):
        return [_sample(tokenizer, whole, spans)]
    return [_sample(tokenizer, text, [span]) for text, span in zip(through, spans, strict=True)]


def _beginning(tokenizer: Any, before: list[Any], through: str) -> int:
    """Characters of ``through`` that come before its last message's own."""
    for prompt in (True, False):  # a prompt may promise what this answer does not do, such as thinking first
        text = _render(tokenizer, before, add_generation_prompt=prompt)
        if through.startswith(text):
            return len(text)
    raise ValueError("it changes what comes before an answer; mark answers in it with {% generation %}")


def _render(tokenizer: Any, messages: list[Any], **settings: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))


def _sample(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Sample:
    """Tokens of ``text``; those that overlap one of ``spans`` (characters) are scored."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    scored = [any(start < stop and end > begin for begin, stop in spans) for start, end in encoded["offset_mapping"]]
    return Sample(list(encoded["input_ids"]), scored)
