"""A conversation becomes the tokens that a model is to continue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hmf_jax.text.messages import SYSTEM, Message, parse_arguments, shown
from hmf_jax.text.parts import END_THINK, THINK
from hmf_jax.text.template import render, texts
from hmf_jax.text.tokenizer import tag_ids

# Of `apply_chat_template`: what a template gets is not decided by its own options.
_RESERVED = frozenset(
    "add_generation_prompt chat_template continue_final_message conversation documents max_length "
    "messages padding return_assistant_tokens_mask return_dict return_tensors "
    "sanitize_control_tokens template tokenize tokenizer tokenizer_kwargs tools truncation".split()
)


class Rendered(NamedTuple):
    """A conversation as a chat template writes it.

    Attributes:
      tokens: all of it.
      cuts: numbers of tokens, ascending, up to which other prompts are likely to be the same: where
        the system message and the tools end, and where the beginning of the reply starts.
      thinking: it ends within a block of thinking: the reply begins with thoughts.
      closed: it ends after a closed block of thinking: the model is told not to think.
      text: all of it.
    """

    tokens: list[int]
    cuts: tuple[int, ...]
    thinking: bool
    closed: bool
    text: str


def render_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    /,
    *,
    tools: Sequence[Message] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    template: str | None = None,
    **template_kwargs: Any,
) -> Rendered:
    """The prompt for the next reply of a conversation, and what other prompts share of it.

    Args:
      tokenizer: a Hugging Face tokenizer.
      messages: as `check_messages` or `api_messages` returns them. Arguments of calls may be JSON
        text, which the template gets as it is; templates that need objects get objects.
      tools: JSON schemas, as `check_tools` returns them.
      add_generation_prompt: the prompt ends with the beginning of a reply.
      continue_final_message: the prompt ends within the last message, which is to go on.
      add_special_tokens: the tokenizer adds its own, BOS for example: templates write them already.
      template: instead of the tokenizer's.
      template_kwargs: for the template: enable_thinking, for example. See `check_template_kwargs`.

    Raises:
      ValueError: the template fails, leaves out a system message, or writes nothing; contradictory
        options.
    """
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "continue_final_message goes on with the last message, so it needs "
            "add_generation_prompt=False"
        )
    if continue_final_message and not (messages and messages[-1]["content"]):
        raise ValueError("continue_final_message needs a last message that is not empty")
    check_template_kwargs(template_kwargs)
    options = {**template_kwargs, **({"tools": list(tools)} if tools else {})}
    if template is not None:
        options["chat_template"] = template
    messages = _with_arguments(tokenizer, messages, template)

    def write(messages: Sequence[Message], begins: bool = False, goes_on: bool = False) -> str:
        return render(
            tokenizer,
            messages,
            add_generation_prompt=begins,
            continue_final_message=goes_on,
            **options,
        )

    prompt = write(messages, add_generation_prompt, continue_final_message)
    check_system(messages, prompt)
    before = messages if add_generation_prompt else messages[:-1] if continue_final_message else ()
    others = [write(before) if before else None, _another(write, messages)]
    tokens = tokenizer.encode(prompt, add_special_tokens=add_special_tokens, verbose=False)
    if not tokens:
        raise ValueError("the chat template writes nothing for this conversation")

    def shared(other: str | None) -> int:
        return 0 if other is None else _shared(tokenizer, prompt, tokens, other, add_special_tokens)

    places = [shared(other) for other in others]
    replies = add_generation_prompt or continue_final_message
    own = tokens[places[0] :] if replies else []
    last = _last_tag(tokenizer, own)
    cuts = tuple(sorted({place for place in places if place}))
    return Rendered(tokens, cuts, last == THINK, last == END_THINK, prompt)


def check_template_kwargs(kwargs: Mapping[str, Any], name: str = "chat_template_kwargs") -> None:
    """Raises ValueError if a chat template cannot be given these values; which one."""
    for key, value in kwargs.items():
        if key in _RESERVED or not key.isidentifier():
            raise ValueError(f"{name}: {shown(key)} is no option of a chat template")
        if key == "enable_thinking" and not isinstance(value, bool):
            raise ValueError(f"{name}.enable_thinking={shown(value)} must be true or false")


def check_system(messages: Sequence[Message], prompt: str) -> None:
    """Raises ValueError if a template has left out what a system message says."""
    for i, m in enumerate(messages):
        if m["role"] in SYSTEM and m["content"].strip() not in prompt:
            raise ValueError(f"the chat template leaves out messages[{i}], of the {m['role']}")


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How long the beginning is that two sequences share."""
    same, most = 0, min(len(a), len(b))
    while same < most:
        middle = (same + most + 1) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


def _shared(
    tokenizer: Any, text: str, tokens: list[int], other: str, add_special_tokens: bool
) -> int:
    """How many of the tokens of a text another text begins with.

    Encoding a long text takes longer than finding a prefix in a cache. No token reaches across a
    special one: the other text is encoded from the last one on that both have.
    """
    same = common(text, other)
    special = max(
        tokenizer.all_special_tokens, key=lambda one: text.rfind(one, 0, same), default=""
    )
    start, id = text.rfind(special, 0, same), tokenizer.convert_tokens_to_ids(special)
    places = [i for i, token in enumerate(tokens) if token == id]
    if special and start >= 0 and len(places) == text.count(special):
        first = places[text.count(special, 0, start)]
        rest = tokenizer.encode(other[start:], add_special_tokens=False, verbose=False)
        return first + common(tokens[first:], rest)
    whole = tokenizer.encode(other, add_special_tokens=add_special_tokens, verbose=False)
    return common(tokens, whole)


def _another(write: Callable[..., str], messages: Sequence[Message]) -> str | None:
    """A conversation with the same system messages and tools in which the user says another thing.

    What it shares with this one ends where the user begins: a system message alone, which would end
    there, too, is no conversation for some templates.
    """
    start = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM), None)
    if start is None:
        return None
    other = "!" if messages[start]["content"].startswith("?") else "?"
    try:
        return write([*messages[:start], {"role": "user", "content": other}])
    except ValueError:  # of templates that also look at the number of messages, for example
        return None


def _last_tag(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """The last tag of thinking in these tokens."""
    ids = tag_ids(tokenizer, (THINK, END_THINK))
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    places = {
        tag: max((i for i, t in enumerate(tokens) if t == ids[tag]), default=-1)
        if len(ids) == 2
        else text.rfind(tag)
        for tag in (THINK, END_THINK)
    }
    last = max(places, key=lambda tag: places[tag])
    return last if places[last] >= 0 else None


def _with_arguments(
    tokenizer: Any, messages: Sequence[Message], template: str | None
) -> Sequence[Message]:
    """The messages with arguments of calls as the template needs them: as JSON text, or objects."""
    calls = (call for m in messages for call in m.get("tool_calls", ()))
    if not any(isinstance(call["function"]["arguments"], str) for call in calls):
        return messages
    whole = tuple(texts(tokenizer.chat_template)) if template is None else (template,)
    if _takes_text(tokenizer, whole, template):
        return messages
    return [
        {**m, "tool_calls": parse_arguments(m["tool_calls"], f"messages[{i}].tool_calls")}
        if "tool_calls" in m
        else m
        for i, m in enumerate(messages)
    ]


@functools.lru_cache(maxsize=16)
def _takes_text(tokenizer: Any, whole: tuple[str, ...], template: str | None) -> bool:
    """Whether a template writes JSON text of arguments as it is; `whole` is for the cache only."""
    del whole
    arguments = '{"probe":  1}'  # with two blanks: as it would be written by nobody else
    function = {"name": "probe", "arguments": arguments}
    call = {"id": "probe", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "probe"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    options = {} if template is None else {"chat_template": template}
    try:
        return arguments in render(tokenizer, messages, **options)
    except ValueError:
        return False
