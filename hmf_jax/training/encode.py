"""Texts and chats become tokens, and which of them are to be predicted."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from hmf_jax.text.thinking import END_THINK, THINK
from hmf_jax.training.formats import EmptyRow, read_messages

# A thinking block at the end of a generation prompt, open or closed.
_PROMPT_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")
Render = Callable[..., str]
# Arguments of apply_chat_template that are no variables of the template; here they are set.
_RESERVED = frozenset(
    "conversation messages tools chat_template add_generation_prompt continue_final_message "
    "tokenize padding truncation max_length return_tensors return_dict tokenizer_kwargs "
    "return_assistant_tokens_mask".split()
)


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Tokens of a text, as its tokenizer writes it, and the end token; all but the first are
    targets.

    Raises:
      ValueError: the text is empty.
    """
    if not text.strip():
        raise EmptyRow("empty text")
    tokens = _with_end(tokenizer, tokenizer(text, verbose=False)["input_ids"])
    return tokens, [i > 0 for i in range(len(tokens))]


def encode_completion(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Tokens of a prompt and its completion and the end token; the targets are the completion's.

    Both are one text for the tokenizer. A token with parts of both is a target.

    Raises:
      ValueError: the completion is empty.
    """
    if not completion.strip():
        raise EmptyRow("empty completion")
    encoding = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
    tokens = _with_end(tokenizer, encoding["input_ids"])
    targets = [end > len(prompt) for _, end in encoding["offset_mapping"]]
    targets = [*targets[: len(tokens) - 1], True]  # what follows the prompt has a last token
    return tokens, [False, *targets[1:]]


def encode_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation; targets are what the assistant writes, its end token included.

    The chat template says what that is: by its `{% generation %}` block if it has one, else by what
    a message adds to the generation prompt before it. A template that shows thinking only in the
    newest turn (Qwen3) trains it only there.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a chat template.
      messages: chat messages, see `read_messages`. Replies of "weight" 0 are no targets.
      tools: tool descriptions for the template.
      options: further variables of the template, for example enable_thinking=False.

    Raises:
      ValueError: no messages, none of the assistant, an unknown role, a template that leaves out
        something of them, or that writes a message differently in the whole conversation than as
        its last one.
    """
    messages = read_messages(messages)
    if wrong := sorted(_RESERVED & set(options)):
        raise ValueError(f"no variables of a chat template: {', '.join(wrong)}")
    if not messages:
        raise EmptyRow("no messages")
    weights = [m.pop("weight", 1) for m in messages]
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not replies:
        raise ValueError("no message of the assistant")
    if not any(weights[i] for i in replies):
        raise EmptyRow("no reply of weight 1")
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: set tokenizer.chat_template")

    def write(messages: Sequence[dict[str, Any]], prompt: bool = False, **changes: Any) -> str:
        given = {**options, "tools": tools, **changes}
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **given
        )

    try:
        whole = write(messages)
        if re.search(r"{%[-+]?\s*generation\b", str(tokenizer.chat_template)):
            out = tokenizer.apply_chat_template(
                messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **{**options, "tools": tools},
            )
            _check_shown(write, whole, messages, tools)
            targets = np.asarray(out["assistant_masks"], bool)
            return out["input_ids"], _weighed(targets, [weights[i] for i in replies]).tolist()
        spans, at = [], 0
        for i in replies:
            start, end = _find_reply(whole, at, *_prefixes(write, messages, i))
            spans += [(start, end)] if weights[i] else []
            at = end
        _check_shown(write, whole, messages, tools)
    except TemplateError as e:
        raise ValueError(f"the chat template refuses the conversation: {e}") from e
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


def _with_end(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return [*tokens] if end is None or list(tokens[-1:]) == [end] else [*tokens, end]


def _check_shown(render: Render, whole: str, messages: list[dict[str, Any]], tools: Any) -> None:
    """Raises ValueError if the template leaves out something that the conversation has."""
    for m in messages:
        # Templates trim content, and some write what tools return as JSON.
        shown = m["content"].rpartition(END_THINK)[2].strip()
        forms = (shown, json.dumps(shown)[1:-1], json.dumps(shown, ensure_ascii=False)[1:-1])
        if not any(form in whole for form in forms):
            raise ValueError(
                f"the chat template leaves out or changes a message: the {m['role']}'s"
            )
    thought = messages[-1].get("reasoning_content", "").strip()
    if thought not in whole:
        raise ValueError("the chat template leaves out reasoning_content")
    bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
    for name, without in (("tools", (messages, None)), ("tool_calls", (bare, tools))):
        if tools if name == "tools" else bare != messages:
            with contextlib.suppress(TemplateError, TypeError):
                if render(without[0], tools=without[1]) == whole:
                    raise ValueError(f"the chat template leaves out {name}")


def _weighed(targets: np.ndarray, weights: list[int]) -> np.ndarray:
    """Targets of a template's generation blocks, without those of replies of weight 0."""
    targets = targets.copy()
    targets[:1] = False
    if all(weights):
        return targets
    edges = np.flatnonzero(np.diff(np.concatenate([[False], targets, [False]]).astype(np.int8)))
    blocks = edges.reshape(-1, 2)
    if len(blocks) != len(weights):
        raise ValueError(
            f"weight 0 needs one generation block per reply: the chat template writes "
            f"{len(blocks)} for {len(weights)}"
        )
    for (start, end), weight in zip(blocks, weights, strict=True):
        targets[start:end] &= bool(weight)
    return targets


def _prefixes(render: Render, messages: list[dict[str, Any]], i: int) -> tuple[str, str, str]:
    """The conversation before reply `i`, that with the generation prompt, and that with it."""
    after = render(messages[: i + 1])
    if i:
        # A template may ask for a question, which there is not before a chat's first reply.
        with contextlib.suppress(TemplateError):
            return render(messages[:i]), render(messages[:i], True), after
    question = [{"role": "user", "content": "?"}]
    header = render(question, True).removeprefix(render(question))
    for prompt in dict.fromkeys((header, _PROMPT_THINKING.sub("", header))):
        if prompt and (at := after.find(prompt)) >= 0:
            return after[:at], after[: at + len(prompt)], after
    raise ValueError(
        "a chat that begins with the assistant: the chat template has no generation prompt there"
    )


def _find_reply(whole: str, at: int, before: str, prompted: str, after: str) -> tuple[int, int]:
    """Start and end of a reply in the whole text, which is searched from `at` at the earliest.

    The other texts end before the message, with the generation prompt, and after the message.
    """
    plain = _PROMPT_THINKING.sub("", prompted)
    if not after.startswith(prompted) and after.startswith(plain):
        if after[len(plain) :].lstrip().startswith(THINK):
            raise ValueError("a reply with thinking: the generation prompt ends thinking before it")
        prompted = plain
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
