"""What is streamed of a reply is the reply: reasoning, content and calls, however it is grouped."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.text import CallArguments, CallStart, Content, Reasoning, ReplyDeltas, TextStream
from hmf_jax.text.parts import CALL, END_CALL, TAGS
from hmf_jax.text.tokenizer import tag_ids
from tests.text.test_parts import TOKENIZERS


def joined(deltas: list[Any]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content and calls, from the deltas alone."""
    reasoning = "".join(d.text for d in deltas if isinstance(d, Reasoning))
    content = "".join(d.text for d in deltas if isinstance(d, Content))
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, CallStart):
            assert delta.index == len(calls) and re.fullmatch("call_[0-9a-f]{24}", delta.id)
            calls.append([delta.name, ""])
        elif isinstance(delta, CallArguments):
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.text
    return reasoning, content, [(name, arguments) for name, arguments in calls]


def check(parts: ReplyDeltas, deltas: list[Any]) -> tuple[str, str, list[tuple[str, str]]]:
    found = joined(deltas)
    functions = [call["function"] for call in parts.tool_calls]
    assert found == (
        parts.thinking or "",
        parts.text,
        [(f["name"], f["arguments"]) for f in functions],
    )
    ids = [call["id"] for call in parts.tool_calls]
    assert ids == [d.id for d in deltas if isinstance(d, CallStart)] and len(set(ids)) == len(ids)
    assert all(d.text for d in deltas if not isinstance(d, CallStart))
    return found


def by_text(text: str, sizes: list[int] | int = 1, **options: Any):
    """The deltas of a text that comes in groups of so many characters; tags are no tokens."""
    parts, deltas, at = ReplyDeltas({}, **{"tools": True, **options}), [], 0
    for size in sizes if isinstance(sizes, list) else [sizes] * len(text):
        deltas += parts.push(text[at : at + size])
        at += size
    deltas += parts.push(text[at:])
    return check(parts, deltas + parts.finish())


def by_tokens(text: str, kind: str, size: int, **options: Any):
    tokenizer = TOKENIZERS[kind]
    tags = tag_ids(tokenizer, TAGS)
    stream = TextStream(tokenizer, watch={token: tag for tag, token in tags.items()})
    parts, deltas = ReplyDeltas(tags, **{"tools": True, **options}), []
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for i in range(0, len(tokens), size):
        new = tokens[i : i + size]
        deltas += parts.push(stream.push(new, [0.0] * len(new)), stream.places)
    deltas += parts.push(stream.finish(), stream.places)
    return check(parts, deltas + parts.finish())


def call(arguments: str, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ARGUMENTS = [
    "{}",
    '{"a": 1}',
    '{ "a" :\n[1, {"b": null}] }',
    '{"a": "}}{[", "b": "{"}',
    r'{"a": "say \"}\" and \\"}',
    r'{"a": "\u00e9\ud83d\ude00 \n"}',
    '{"é": "日本", "q": "</tool_call>", "r": "<tool_call>"}',
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_arguments_are_the_bytes_of_the_model(arguments, size):
    json.loads(arguments)
    assert by_text(call(arguments), size) == ("", "", [("f", arguments)])
    several = f"See.\n{call(arguments)}\n{call('{}', 'g')}\n{call(arguments, 'h')}\n"
    expected = [("f", arguments), ("g", "{}"), ("h", arguments)]
    assert by_text(several, size) == ("", "See.", expected)
    for kind in ("added", "text"):
        assert by_tokens(several, kind, size) == ("", "See.", expected)


EMPTY, ONE = [("f", "{}")], [("f", '{"a": 1}')]
MENTIONED, HEAD = "hm, <tool_call> it is.", '<tool_call>\n{"name": "f", "arguments": '
REPLIES = [  # reply, opened, reasoning, content, calls
    ("<think>\nhm\n</think>\n\nhello", False, "hm", "hello", []),
    ("hm\n</think>\n\n\nhello", True, "hm", "hello", []),
    ("unfinished", True, "unfinished", "", []),
    ("", True, "", "", []),
    ("hello", False, "", "hello", []),
    ("hello <tool", False, "", "hello <tool", []),
    (f"hm\n</think>\n\n{call('{}')}", True, "hm", "", EMPTY),
    (f"hm\n{call('{}')}", True, "hm", "", EMPTY),  # a call ends the thinking
    (f"{MENTIONED}\n</think>\n\n{call('{}')}", True, MENTIONED, "", EMPTY),
    (f"So.{call('{}')} Done.", False, "", "So. Done.", EMPTY),
    # Key order, missing arguments, arguments as text, blanks, escapes in the name.
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', False, "", "", ONE),
    ('<tool_call>{"name": "f"}</tool_call>', False, "", "", EMPTY),
    ('<tool_call> {"name" : "f" , "arguments":"{\\"a\\": 1}"} </tool_call>', False, "", "", ONE),
    (
        '<tool_call>\n\n{"n\\u0061me":"\\u0066",\n"arguments":\t{}}\n\n</tool_call>',
        False,
        "",
        "",
        EMPTY,
    ),
    # What is cut off: arguments are kept, what came before them is text.
    (HEAD + '{"a": "b', False, "", "", [("f", '{"a": "b')]),
    (HEAD, False, "", HEAD, []),
    (call("{}")[: -len(END_CALL)], False, "", "", EMPTY),
    # One that cannot be taken back.
    (call('{"a": 1').replace("}}", "}"), False, "", "", ONE),
    (call("{}}}}"), False, "", "", EMPTY),
    (f"{call('{}')[: -len(END_CALL)]}{call('{}', 'g')}", False, "", "", [*EMPTY, ("g", "{}")]),
    (HEAD + '{}, "x": [{"}": 1}], "y": 2}</tool_call>', False, "", "", EMPTY),
]


@pytest.mark.parametrize(("reply", "opened", "reasoning", "content", "calls"), REPLIES)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_parts_of_a_reply(reply, opened, reasoning, content, calls, size):
    expected = (reasoning, content, calls)
    assert by_text(reply, size, opened=opened) == expected
    assert by_tokens(reply, "added", size, opened=opened) == expected
    if "<tool_call>" not in reasoning + content:  # those tags have no text
        assert by_tokens(reply, "special", size, opened=opened) == expected


@pytest.mark.parametrize(
    "body",
    ["{broken}", "[]", '"f"', "{}", "", '{"name": ""}', '{"name": 5, "arguments": {}}', "nothing"]
    + ['{"name": "f",}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "[1]"}']
    + ['{"name": "f", "arguments": null}', '{"id": 1, "name": "f", "arguments": {}}', '{"a" 1}']
    + ['{"arguments": {}, "arguments": {}, "name": "f"}', '{"name": "\\x", "arguments": {}}'],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_malformed_calls_are_content(body, size):
    reply = f"Text <tool_call>{body}</tool_call> and {call('{}')}"
    text = reply.removesuffix(f" {call('{}')}")
    assert by_text(reply, size) == ("", text, [("f", "{}")])
    assert by_tokens(reply, "added", size) == ("", text, [("f", "{}")])


def test_a_call_begins_with_its_arguments():
    parts = ReplyDeltas({}, tools=True)
    assert parts.push('Ok.\n<tool_call>\n{"name": "f", "arg') == [Content("Ok.")]
    start, arguments = parts.push('uments": {"a": ')
    assert isinstance(start, CallStart) and (start.index, start.name) == (0, "f")
    assert arguments == CallArguments(0, '{"a": ')
    assert parts.push("1}}\n</tool") == [CallArguments(0, "1}")]
    assert parts.push("_call>\n") == [] == parts.finish()
    # Several calls in one delta.
    many = ReplyDeltas({}, tools=True).push(f"{call('{}')}\n{call('{}', 'g')}")
    assert [type(d) for d in many] == [CallStart, CallArguments] * 2


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_without_tools_their_tags_are_text(kind):
    reply = call('{"a": 1}')
    shown = reply.replace(CALL, "").replace(END_CALL, "") if kind == "special" else reply
    assert by_tokens(reply, kind, 3, tools=False) == ("", shown, [])


def test_tags_of_thinking_are_in_neither_field():
    reply = "<think>\n<think>\na<think>b\n</think>\n\nc</think>d<think>e"
    for size in (1, 3, 1000):
        assert by_tokens(reply, "added", size) == ("ab", "cde", [])
        assert by_tokens(reply, "special", size) == ("ab", "cde", [])
    # Where they are no tokens, they cannot be told from text about them.
    assert by_text(reply) == ("<think>\na<think>b", "c</think>d<think>e", [])
    assert by_tokens("a</think>b", "added", 1, thinking=False) == ("", "a</think>b", [])


def test_how_many_tokens_are_thinking():
    tokenizer = TOKENIZERS["added"]
    tags = tag_ids(tokenizer, TAGS)

    def count(text: str, **options: Any) -> tuple[int, int]:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        stream = TextStream(tokenizer, watch={token: tag for tag, token in tags.items()})
        parts = ReplyDeltas(tags, **options)
        parts.push(stream.push(tokens, [0.0] * len(tokens)), stream.places)
        parts.finish()
        return parts.reasoning_tokens(tokens), len(tokens)

    end = len(tokenizer.encode("<think>a b</think>"))
    assert count("<think>a b</think> c")[0] == end
    assert count("a b c", opened=True) == (5, 5)
    assert count("a b c")[0] == 0
    before, whole = count(f"a{call('{}')}", opened=True, tools=True)
    assert (before, whole > 10) == (1, True)


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "a", '"', "\\", "{", "}"]
PIECES += ['{"name": "f", "arguments": {', '"a": "', "}}", "<", "</", "tool_call>", call("{}")]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.data(), st.booleans(), st.booleans())
def test_any_grouping_gives_the_same(pieces, data, opened, tools):
    text = "".join(pieces)
    whole = by_text(text, 10**6, opened=opened, tools=tools)
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=12))
    assert by_text(text, sizes, opened=opened, tools=tools) == whole
    assert by_text(text, 1, opened=opened, tools=tools) == whole
    for kind in ("added", "special"):
        one, several = (by_tokens(text, kind, n, opened=opened, tools=tools) for n in (1, 5))
        assert one == several


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.text(min_size=1), st.booleans())
def test_any_arguments_come_through(arguments, name, ascii):
    written = json.dumps(arguments, ensure_ascii=ascii)
    head = json.dumps(name, ensure_ascii=ascii)
    reply = f'<tool_call>\n{{"name": {head}, "arguments": {written}}}\n</tool_call>'
    for size in (1, 7):
        assert by_text(reply, size) == ("", "", [(name, written)])
