"""Messages of a conversation, and tools: what they may hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hmf_jax.convert.directories import printable
from hmf_jax.convert.reading import strict_json
from hmf_jax.text.template import one_line

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM = ("system", "developer")
MOST = 4096  # messages of a request
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")

Message = dict[str, Any]
Said = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def check_messages(messages: Any, name: str = "messages") -> list[Message]:
    """Copies of messages as chat templates take them: content is a string.

    Args:
      messages: dicts of role ("system", "developer", "user", "assistant", "tool") and content: a
        string or a list of {"type": "text", "text": ...}, which are joined. Of the assistant also
        reasoning_content and tool_calls, [{"type": "function", "function": {"name": ...,
        "arguments": {...}}}], of a tool also tool_call_id and name.
      name: of the argument, for errors.

    Raises:
      ValueError: anything else, or nothing, is in a message; which one and what.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"{name} must be a list of messages, not {type(messages).__name__}")
    return [_check(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def said(message: Said) -> list[Message]:
    """What somebody says to the model, as messages: a text of the user, a message, or several.

    Raises ValueError as `check_messages` does, and if there is nothing for the model to answer.
    """
    if isinstance(message, str):
        message = {"role": "user", "content": message}
    found = check_messages([message] if isinstance(message, Mapping) else message, "message")
    if not found:
        raise ValueError("message is an empty list: there is nothing to answer")
    if found[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"the last message is of the {found[-1]['role']}, and a model answers a user or a tool"
        )
    return found


def _check(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a dict with role and content, not {shown(message)}")
    found = {key: value for key, value in message.items() if value is not None}
    unknown = [key for key in found if key not in _KEYS]
    if unknown:
        hint = " (what it thinks is reasoning_content)" if "reasoning" in unknown else ""
        raise ValueError(
            f"{where} has the key {shown(unknown[0])}; known are {', '.join(_KEYS)}{hint}"
        )
    role = found.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}: role={shown(role)} is unknown; use {', '.join(ROLES)}")
    own = {"tool_calls": "assistant", "reasoning_content": "assistant", "tool_call_id": "tool"}
    for key, whose in own.items():
        if key in found and role != whose:
            raise ValueError(f"{where}: {key} is for messages of the {whose}, not of the {role}")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in found:
            check_text(found[key], f"{where}.{key}")
    if "tool_calls" in found:
        found["tool_calls"] = _check_calls(found["tool_calls"], f"{where}.tool_calls")
    found["content"] = _content(found.get("content", ""), f"{where}.content")
    # A tool may return nothing, and the assistant may call tools, or be stopped, before it speaks.
    if not found["content"] and role not in ("assistant", "tool"):
        raise ValueError(f"{where}: the content of the {role}'s message is empty")
    return found


def _content(content: Any, where: str, strict: bool = True) -> str:
    if isinstance(content, list | tuple):
        return "".join(_part(part, f"{where}[{i}]", strict) for i, part in enumerate(content))
    check_text(content, where, "a string, or a list of text parts")
    return content


def _part(part: Any, where: str, strict: bool) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        what = shown(part) if kind is None else f"a part of type {shown(kind)}"
        raise ValueError(f'{where} is {what}; only {{"type": "text", "text": ...}} is supported')
    check_text(part.get("text"), f"{where}.text")
    if strict and (extra := set(part) - {"type", "text"}):
        raise ValueError(f"{where} has the key {shown(min(map(str, extra)))}; known: type, text")
    return part["text"]


def shown(value: Any) -> str:
    """A value in an error: one line, at most 60 characters of it."""
    return printable(repr(value), 60)


def check_text(text: Any, where: str, what: str = "a string") -> None:
    """Raises ValueError, which names the place, unless it is a string of whole characters."""
    if not isinstance(text, str):
        hint = "; write values as JSON text" if isinstance(text, Mapping) else ""
        raise ValueError(f"{where} must be {what}, not {shown(text)}{hint}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{where} holds half of a surrogate pair at {e.start}: no Unicode"
        ) from None


def _check_calls(calls: Any, where: str) -> list[Message]:
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where} must be a list of calls, not {shown(calls)}")
    return [_check_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _check_call(call: Any, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise ValueError(
            f'{where} must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}'
        )
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where}: name={shown(function.get('name'))} must be a string")
    arguments = parsed(function.get("arguments", {}))
    if arguments is None:
        raise ValueError(f"{where}: arguments must be an object, or the JSON text of one")
    id = {"id": call["id"]} if call.get("id") is not None else {}
    return {
        **id,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def parsed(arguments: Any) -> Message | None:
    """Arguments of a call as an object: they may be its JSON text; None if they are neither."""
    if isinstance(arguments, str):  # as OpenAI's interface has it
        try:
            arguments = strict_json(arguments)
        except (ValueError, RecursionError):
            return None
    return dict(arguments) if isinstance(arguments, Mapping) else None


def parse_arguments(calls: Sequence[Message], where: str) -> list[Message]:
    """The same calls with arguments that are objects; ValueError if some are not.

    Args:
      calls: as `api_messages` returns them.
      where: they are, for errors.
    """
    found = []
    for i, call in enumerate(calls):
        arguments = parsed(call["function"]["arguments"])
        if arguments is None:
            raise ValueError(
                f"{where}[{i}].function.arguments must be the JSON text of an object: the chat "
                "template writes it down value by value"
            )
        found.append({**call, "function": {**call["function"], "arguments": arguments}})
    return found


def api_messages(messages: Any, name: str = "messages") -> list[Message]:
    """Messages of a request to OpenAI's interface, as `render_prompt` takes them.

    In contrast to `check_messages`, arguments of calls stay the text that the client sent, so that
    a template can write them as the model did; fields that are unknown are left out; the role
    "developer" becomes "system", "reasoning" is another name for "reasoning_content", and what a
    user says may be empty.

    Args:
      messages: 1 to 4096 dicts, of JSON.
      name: of the field, for errors.

    Raises:
      ValueError: names the message and the field: "messages[2].content must be ...".
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{name} must be a list of messages, not {shown(messages)}")
    if not 1 <= len(messages) <= MOST:
        raise ValueError(f"{name} must hold 1 to {MOST} messages, not {len(messages)}")
    return [_api_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _api_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be an object with role and content, not {shown(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, not {shown(role)}")
    if "content" not in given and role not in ("assistant", "tool"):
        raise ValueError(f"{where}.content is missing: what does the {role} say?")
    found: Message = {"role": "system" if role == "developer" else role}
    found["content"] = _content(given.get("content", ""), f"{where}.content", strict=False)
    for key in ("name", "tool_call_id"):
        if key in given:
            check_text(given[key], f"{where}.{key}")
            found[key] = given[key]
    if role != "assistant":
        return found
    for key in ("reasoning_content", "reasoning"):
        if key in given:
            check_text(given[key], f"{where}.{key}")
            found.setdefault("reasoning_content", given[key])
    calls = given.get("tool_calls", ())
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where}.tool_calls must be a list, not {shown(calls)}")
    if calls:
        found["tool_calls"] = [
            _api_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return found


def _api_call(call: Any, where: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f'{where} must be {{"id": ..., "type": "function", "function": {{"name": ..., '
            '"arguments": ...}}'
        )
    if call.get("type", "function") != "function":
        raise ValueError(f'{where}.type must be "function", not {shown(call["type"])}')
    check_text(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    arguments = "{}" if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, Mapping):  # some clients send the object itself
        check_text(arguments, f"{where}.function.arguments", "the JSON text of an object")
    id = call.get("id")
    if id is not None:
        check_text(id, f"{where}.id")
    body = {"name": function["name"], "arguments": arguments}
    return {**({} if id is None else {"id": id}), "type": "function", "function": body}


def check_tools(tools: Any) -> list[Message]:
    """JSON schemas of tools, of which some may be Python functions with types and a docstring.

    Raises:
      ValueError: something else, or a function that transformers makes no schema of.
    """
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of JSON schemas or functions, not {shown(tools)}")
    return [_check_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _check_tool(tool: Any, where: str) -> Message:
    if callable(tool):
        from transformers.utils.chat_template_utils import get_json_schema

        try:
            tool = get_json_schema(tool)
        except Exception as e:
            raise ValueError(f"{where}: {one_line(e)}") from e
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{where} must be a function, or {{"type": "function", "function": {{"name": ..., '
            f'"description": ..., "parameters": ...}}}}, not {shown(tool)}'
        )
    try:
        return json.loads(json.dumps(tool, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"{where} is no JSON: {one_line(e)}") from None
