"""What a row of training data says: its format, and the text or the messages that are trained.

The formats are told apart by their columns (`FORMATS`). Messages of OpenAI, Hugging Face and
ShareGPT become those of Hugging Face chat templates. Sources: the data formats of OpenAI's
fine-tuning guide, of TRL's SFTTrainer, and of the original (alpaca and sharegpt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hmf_jax.convert.reading import strict_json
from hmf_jax.text.messages import ROLES, check_text, shown
from hmf_jax.text.thinking import END_THINK, THINK

# Names of roles in "conversations" (ShareGPT), and the older name of "tool" in OpenAI's messages.
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
# Columns by which a format is known -> the columns that may stand beside it.
FORMATS: dict[str, tuple[str, ...]] = {
    "text": (),
    "messages": ("system", "tools", "functions", "chat_template_kwargs"),
    "conversations": ("system", "tools"),
    "instruction": ("input", "output", "system", "history", "tools"),
    "completion": ("prompt", "tools", "chat_template_kwargs"),
}
_PREFERENCES = "preference data (DPO, KTO), which are not trained here"
_MEDIA = "only text is trained here"
_REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), _PREFERENCES),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), _PREFERENCES),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
}
COLUMNS = frozenset([*FORMATS, *(c for more in FORMATS.values() for c in more), *_REFUSED, "label"])
# Keys of a message that mean something here; others are for the chat template.
_MESSAGE_KEYS = frozenset(
    "role content from value name tool_calls tool_call_id function_call reasoning_content weight "
    "train loss refusal audio".split()
)


class EmptyRow(ValueError):
    """A row without content."""


class RefusedRow(ValueError):
    """A row that shows that these data cannot be trained as they are; never left out silently."""


class Example(NamedTuple):
    """What is trained in a row: a chat (`messages`) or a text, which may follow a prompt.

    Attributes:
      text: the text; all of it is trained.
      prompt: what comes before the text, not trained; None: nothing.
      messages: of a chat; see `read_messages`.
      tools: for the chat template.
      options: further variables of the chat template, of this row alone.
    """

    text: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    options: Mapping[str, Any] = {}


def rename(row: Any, column: str | Mapping[str, str] | None) -> dict[str, Any]:
    """The columns of a row that are not null, under the names of `FORMATS`."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be an object with columns: this is {_type(row)}")
    if isinstance(column, Mapping):
        if missing := [name for name in column.values() if name not in row]:
            raise ValueError(f"no column {_names(missing)}: there are {_names(row)}")
        theirs = set(column.values())
        row = {k: v for k, v in row.items() if k not in theirs and k not in column} | {
            ours: row[name] for ours, name in column.items()
        }
    return {str(k): v for k, v in row.items() if v is not None}


def format_of(row: Any, column: str | Mapping[str, str] | None = None) -> str:
    """The format of a row, a name of `FORMATS`; with a column's name: "text" or "messages".

    Raises:
      EmptyRow: the columns are null.
      RefusedRow: columns of two formats, of preference data, or of images and the like.
      ValueError: none of the columns is known.
    """
    there = rename(row, column)
    if isinstance(column, str):
        if column not in there:
            problem = EmptyRow if column in row else ValueError
            raise problem(f"nothing in column {column!r}: there are {_names(row)}")
        if column in ("text", "messages", "conversations"):
            return column
        value = there[column]
        return "messages" if _is_list(value) or _is_chat_text(value) else "text"
    for name, why in _REFUSED.items():
        if name in there and there[name] not in ("", [], {}):
            raise RefusedRow(f"column {name!r}: {why}")
    if "completion" in there and isinstance(there.get("label"), bool):
        raise RefusedRow(f"column 'label': {_PREFERENCES}")
    found = [name for name in FORMATS if name in there]
    named = [name for name in found if column and name in column]
    found = named if len(named) == 1 else found
    if len(found) > 1:
        raise RefusedRow(
            f"columns of more than one format: {_names(found)}; say which one with `column`, for "
            f"example {{'{found[-1]}': '{found[-1]}'}}"
        )
    if not found:
        if any(name in row for name in FORMATS):
            raise EmptyRow(f"nothing in its columns: {_names(row)}")
        raise ValueError(
            f"no column {', '.join(FORMATS)}: there are {_names(row)}; `column` can rename them"
        )
    return found[0]


def unused(row: Any, column: str | Mapping[str, str] | None = None) -> list[str]:
    """Columns of a row that are not read, and keys of its messages that only a template may use."""
    there, kind = rename(row, column), format_of(row, column)
    name = column if isinstance(column, str) else kind
    known, chat = {name, *FORMATS[kind]}, there[name]
    messages = chat if isinstance(chat, list) else []
    keys = {
        f"messages.{k}": None
        for m in messages
        if isinstance(m, Mapping)
        for k, v in m.items()
        if v is not None and k not in _MESSAGE_KEYS
    }
    return [name for name in there if name not in known] + list(keys)


def read_row(row: Any, column: str | Mapping[str, str] | None = None) -> Example:
    """What is trained in a row of any of the formats.

    Raises what `format_of` and `read_messages` raise; ValueError for values of a wrong type.
    """
    there, kind = rename(row, column), format_of(row, column)
    if isinstance(column, str):
        value = there[column]
        if kind == "text":
            return Example(_text(value, column))
        return _chat(_list(value, column), there, bare_tools=kind == "conversations")
    if kind == "text":
        return Example(_text(there["text"], "text"))
    if kind == "instruction":
        return _alpaca(there)
    if kind == "completion":
        return _completion(there)
    return _chat(_list(there[kind], kind), there, bare_tools=kind == "conversations")


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Messages as Hugging Face chat templates take them.

    Args:
      value: a list of {"role", "content", ...} or {"from", "value"} messages. Content may be parts
        of type "text" (joined), or null beside tool calls. Arguments of tool calls may be JSON
        text. "weight" 0 ("train" or "loss" false) marks a reply that is not trained. Other keys
        stay as they are, for the template.

    Raises:
      RefusedRow: content parts that are no text.
      ValueError: an unknown role, values of a wrong type, no content, what is said twice.
    """
    return [_message(m) for m in _list(value, "messages")]


def _chat(messages: list[Any], there: Mapping[str, Any], bare_tools: bool = False) -> Example:
    found = read_messages(messages)
    system = _text(there.get("system", ""), "system")
    own = [m["content"] for m in found if m["role"] == "system"]
    if system.strip() and own not in ([], [system]):
        raise ValueError("two system prompts: a column and a message")
    if system.strip() and not own:
        found.insert(0, {"role": "system", "content": system})
    tools = _tools(there.get("tools"), "tools", bare_tools)
    functions = _tools(there.get("functions"), "functions", True)
    if tools and functions:
        raise ValueError("both tools and functions: they are the newer and the older name")
    options = there.get("chat_template_kwargs", {})
    if not isinstance(options, Mapping):
        raise ValueError(f"chat_template_kwargs must be an object: this is {_type(options)}")
    return Example(messages=found, tools=tools or functions, options=options)


def _alpaca(there: Mapping[str, Any]) -> Example:
    if "output" not in there:
        raise ValueError(f"an instruction without output: there are {_names(there)}")
    said = [_text(there.get(name, ""), name) for name in ("instruction", "input")]
    output, turns = _text(there["output"], "output"), []
    if not any(map(str.strip, said)) or not output.strip():
        raise EmptyRow("empty instruction or output")
    for pair in _list(there.get("history", []), "history"):
        pair = _list(pair, "history")
        if len(pair) != 2:
            raise ValueError("history is a list of pairs: instruction and output")
        turns.append([_text(x, "history") for x in pair])
    turns.append(["\n".join(filter(None, said)), output])
    roles = ("user", "assistant")
    chat = [{"role": r, "content": x} for turn in turns for r, x in zip(roles, turn, strict=True)]
    return _chat(chat, there, bare_tools=True)


def _completion(there: Mapping[str, Any]) -> Example:
    if "prompt" not in there:
        raise ValueError("a completion without prompt")
    prompt, completion = there["prompt"], there["completion"]
    if _is_chat_text(prompt):
        prompt = _list(prompt, "prompt")
        completion = _list(completion, "completion") if _is_chat_text(completion) else completion
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise EmptyRow("empty completion")
        return Example(_text(completion, "completion"), _text(prompt, "prompt"))
    if not (_is_list(prompt) and _is_list(completion)):
        raise ValueError(
            f"prompt and completion are two texts or two lists of messages: these are "
            f"{_type(prompt)} and {_type(completion)}"
        )
    before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in read_messages(prompt)]
    return _chat([*before, *read_messages(completion)], there)


def _message(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"a message must be an object with role and content: this is {_type(given)}"
        )
    # Tables have all keys in every message: None stands for one that is missing.
    m = {str(k): v for k, v in given.items() if v is not None}
    named = m.pop("from", None)
    if named is not None:
        if "role" in m or "content" in m:
            raise ValueError("a message with both from and role, or value and content")
        m |= {"role": named, "content": m.pop("value", None)}
    role = m.get("role")
    m["role"] = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if m["role"] not in ROLES:
        raise ValueError(f"unknown role: {shown(role)}; there are {', '.join(ROLES)}")
    for name in ("refusal", "audio"):
        if m.pop(name, None):
            raise RefusedRow(f"a message with {name!r}, which is not trained here")
    assistant = m["role"] == "assistant"
    if role == "function_call":
        m |= _called(_text(m["content"], "function_call"))
    m |= _tool_calls(m)
    if not assistant and "tool_calls" in m:
        raise ValueError(f"tool_calls in a message of the {m['role']}: only the assistant calls")
    content = m.get("content")
    if content is None and "tool_calls" not in m:
        raise ValueError(f"no content in a message of the {m['role']}")
    m["content"] = _content(content)
    if "reasoning_content" in m:
        m["reasoning_content"] = _text(m["reasoning_content"], "reasoning_content")
    weight = _weight(m)
    if weight is not None:
        if weight and not assistant:
            raise ValueError(f"weight 1 in a message of the {m['role']}: only replies are trained")
        if assistant:
            m["weight"] = weight
    return m


def _content(content: Any) -> str:
    if content is None:
        return ""
    if not _is_list(content):
        return _text(content, "content")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None:
            raise ValueError(f"a content part must be an object with a type: this is {shown(part)}")
        if kind != "text":
            raise RefusedRow(f"content part of type {shown(kind)}: {_MEDIA}")
        texts.append(_text(part.get("text"), "content"))
    return "".join(texts)


def _weight(m: dict[str, Any]) -> int | None:
    """0 or 1 if a message says whether it is trained; the keys that say so are taken out."""
    said = {name: m.pop(name) for name in ("weight", "train", "loss") if name in m}
    for name, value in said.items():
        flag = isinstance(value, bool)
        if flag != (name != "weight") or value not in (0, 1):
            wanted = "0 or 1" if name == "weight" else "true or false"
            raise ValueError(f"{name} of a message must be {wanted}: this is {shown(value)}")
    if len(set(said.values())) > 1:
        raise ValueError(f"{_names(said)} of a message contradict each other")
    return int(next(iter(said.values()))) if said else None


def _tool_calls(m: dict[str, Any]) -> dict[str, Any]:
    """The tool calls of a message as `{"tool_calls": [...]}`, {} if there are none."""
    calls = _list(m.pop("tool_calls", []), "tool_calls")
    old = m.pop("function_call", None)
    if old is not None:
        if calls:
            raise ValueError("both tool_calls and function_call in a message")
        calls = [old]
    out = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise ValueError(f"a tool call must be an object: this is {_type(call)}")
        call = {k: v for k, v in call.items() if v is not None}
        if call.get("type", "function") != "function":
            raise ValueError(f"tool call of type {shown(call['type'])}: only functions are known")
        function = call.pop("function", None)
        if function is None:
            function = {k: call.pop(k) for k in ("name", "arguments") if k in call}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call without the name of its function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments, "arguments of a tool call") if arguments else {}
        if not isinstance(arguments, Mapping | None):
            raise ValueError(
                f"arguments of a tool call must be an object: these are {_type(arguments)}"
            )
        out.append(
            {
                **call,
                "type": "function",
                "function": {**function, "arguments": dict(arguments or {})},
            }
        )
    return {"tool_calls": out} if out else {}


def _called(value: str) -> dict[str, Any]:
    """The value of a "function_call": JSON text of one call or of several; thinking before it."""
    thought, end, calls = value.rpartition(END_THINK)
    if end and not thought.lstrip().startswith(THINK):
        thought, end, calls = "", "", value
    found = parse_json(calls, "function_call")
    return {"content": thought + end or None, "tool_calls": found if _is_list(found) else [found]}


def _tools(value: Any, name: str, bare: bool) -> list[Any] | None:
    """Descriptions of tools; `bare`: functions may stand there without {"type": "function"}."""
    if value is None or value in ("", []):
        return None
    tools = _list(value, name)
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise ValueError(f"{name} must be a list of objects: one is {_type(tool)}")
    return [
        {"type": "function", "function": t} if bare and "function" not in t and "name" in t else t
        for t in tools
    ] or None


def parse_json(text: str, name: str = "") -> Any:
    """JSON as `strict_json` reads it. Raises ValueError, which begins with `name`."""
    name = f"{name}: " if name else ""
    try:
        return strict_json(text)
    except RecursionError:
        raise ValueError(f"{name}no JSON: nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{name}no JSON: {e}") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_chat_text(value: Any) -> bool:
    """Whether a text is JSON of messages."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return False
    try:
        found = parse_json(value)
    except ValueError:
        return False
    return bool(found) and all(isinstance(m, dict) and {"role", "from"} & set(m) for m in found)


def _list(value: Any, name: str) -> list[Any]:
    """A list, which may be written as JSON text."""
    value = value.tolist() if hasattr(value, "tolist") else value  # a numpy array
    if isinstance(value, str):
        value = parse_json(value, name)
    if not _is_list(value):
        raise ValueError(f"{name} must be a list: this is {_type(value)}")
    return list(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text: this is {_type(value)}")
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character")
    check_text(value, name)
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _names(names: Any) -> str:
    each = [shown(name) for name in names]
    more = f" and {len(each) - 10} more" if len(each) > 10 else ""
    return ", ".join(each[:10]) + more
