"""Texts and chats become tokens, and which of them are to be predicted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hmf_jax.text.thinking import END_THINK

ROLES = ("system", "developer", "user", "assistant", "tool")


# A thinking block at the end of a generation prompt, open or closed.
_PROMPT_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")


class EmptyRow(ValueError):
    """A row without content."""


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Tokens of a text, as its tokenizer writes it, and the end token; all but the first are
    targets.

    Raises:
      ValueError: the text is empty.
    """
    if not text.strip():
        raise EmptyRow("empty text")
    tokens = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1:] != [end]:
        tokens.append(end)
    return tokens, [i > 0 for i in range(len(tokens))]


def encode_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation; targets are what the assistant writes, its end token included.

    The chat template says what that is: by its `{% generation %}` block if it has one, else by what
    a message adds to the generation prompt before it. A template that shows thinking only in the
    newest turn (Qwen3) trains it only there.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a chat template.
      messages: Hugging Face chat messages.
      tools: tool descriptions for the template.
      options: further variables of the template, for example enable_thinking=False.

    Raises:
      ValueError: no messages, none of the assistant, an unknown role, or a template that writes a
        message differently in the whole conversation than as its last one.
    """
    if not messages:
        raise EmptyRow("no messages")
    for m in messages:
        if m.get("role") not in ROLES or not isinstance(m.get("content", ""), str):
            raise ValueError(f"not a chat message: {str(m)[:80]}")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no message of the assistant")

    options = {**options, "tools": tools}
    if re.search(r"{%[-+]?\s*generation\b", str(tokenizer.chat_template)):
        out = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        return out["input_ids"], [bool(m) and i > 0 for i, m in enumerate(out["assistant_masks"])]

    def write(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt, **options
        )

    whole, spans, at = write(len(messages)), [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = write(i) if i else ""
            start, end = _find_reply(whole, at, before, write(i, True), write(i + 1))
            spans.append((start, end))
            at = end
    encoding = tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    first, last = np.asarray(encoding["offset_mapping"]).T
    targets = np.zeros(len(first), bool)
    for start, end in spans:
        # Whitespace may be cut off a token's offsets, so that one before the span ends at `start`.
        targets |= (first >= start) & (start < last) & (last <= end)
    targets[0] = False
    return encoding["input_ids"], targets.tolist()


def _find_reply(whole: str, at: int, before: str, prompted: str, after: str) -> tuple[int, int]:
    """Start and end of a reply in the whole text, which is searched from `at` at the earliest.

    The other texts end before the message, with the generation prompt, and after the message.
    """
    if prompted.startswith(before) and after.startswith(prompted):
        prompt, reply = prompted[len(before) :], after[len(prompted) :].rstrip()
        bare = reply.partition(END_THINK)[2].lstrip("\n") if END_THINK in reply else reply
        at = max(at, len(before)) if whole.startswith(before) else at
        thoughtless = _PROMPT_THINKING.sub("", prompt)
        found = _find(whole, at, prompt, reply), _find(whole, at, thoughtless, bare)
        if any(found):
            return min(span for span in found if span)
    raise ValueError(
        "the chat template writes a reply differently in the middle of a conversation than at its "
        "end; mark the assistant's part of the template with {% generation %} ... "
        "{% endgeneration %}"
    )


def _find(whole: str, at: int, prompt: str, reply: str) -> tuple[int, int] | None:
    """The first reply behind a prompt; only the newest turn may have lost its first newlines."""
    reply = reply.lstrip("\n")
    at = whole.find(prompt, at)
    while reply and at >= 0:
        start = text = at + len(prompt)
        while whole.startswith("\n", text):
            text += 1
        if whole.startswith(reply, text):
            return start, text + len(reply)
        at = whole.find(prompt, at + 1)
    return None
