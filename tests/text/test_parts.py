"""Parts of a reply: thinking, text, calls of tools; pieces agree with the whole."""

from __future__ import annotations

from typing import Any

import pytest

from hmf_jax.demo import build_tokenizer
from hmf_jax.text import TextStream, split_thinking
from hmf_jax.text.calls import parse_call
from hmf_jax.text.parts import TAGS, ReplyParts
from hmf_jax.text.tokenizer import tag_ids

CALLED = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def build(special: bool, tags: bool = True) -> Any:
    """The demo's tokenizer whose tags are special tokens, added tokens, or no tokens at all."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = build_tokenizer().backend_tokenizer
    stored = backend.to_str()
    if not tags:
        stored = stored.replace('"<think>"', '"<t1>"').replace('"</think>"', '"<t2>"')
    backend = type(backend).from_str(stored)
    if tags:
        backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


TOKENIZERS = {
    "added": build(special=False),
    "special": build(special=True),
    "text": build(special=False, tags=False),
}


def split(tokens: list[int], tokenizer: Any, size: int = 1, **options: Any):
    """The parts of these tokens, and the pieces that were given, by groups of `size` tokens."""
    tags = tag_ids(tokenizer, TAGS)
    stream = TextStream(tokenizer, watch={token: tag for tag, token in tags.items()})
    parts, pieces = ReplyParts(tags, **options), []
    for i in range(0, len(tokens), size):
        new = tokens[i : i + size]
        pieces += parts.push(stream.push(new, [0.0] * len(new)), stream.places)
    pieces += parts.push(stream.finish(), stream.places)
    pieces += parts.finish()
    assert "".join(pieces) == stream.text
    for part, whole in (("thinking", parts.thinking or ""), ("text", parts.text)):
        assert "".join(p for p in pieces if p.part == part) == whole
    return parts, pieces


REPLIES = [  # reply, whether the prompt opens a block, thinking, text
    ("hello\n", False, None, "hello\n"),
    ("<think>\nwhy\n</think>\n\nhello", False, "why", "hello"),
    ("why\n</think>\n\nhello", True, "why", "hello"),
    ("<think>\nwhy\n</think>\n\nhello", True, "why", "hello"),  # opened once more
    ("\n<think>\nwhy</think>hello", False, "why", "hello"),
    ("<think>\nunfinished", False, "unfinished", ""),
    ("unfinished", True, "unfinished", ""),
    ("unfinished\n</thin", True, "unfinished\n</thin", ""),
    ("<think>\n\n</think>\n\nhello", False, "", "hello"),
    (
        "<think>\na\n</think>\n\nThe tag </think> closes it.",
        False,
        "a",
        "The tag </think> closes it.",
    ),
    ("Close the block with </think> and go on.", False, None, None),
    ("First words. <think>\nnot now\n</think>", False, None, None),
    ("", False, None, ""),
    ("", True, "", ""),
    (" \n", False, None, " \n"),
]


@pytest.mark.parametrize(("reply", "opened", "thinking", "text"), REPLIES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_only_a_tag_that_begins_a_reply_begins_thinking(reply, opened, thinking, text, kind, size):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(reply, add_special_tokens=False)
    parts, pieces = split(tokens, tokenizer, size, opened=opened)
    expected = reply if text is None else text
    if kind == "special":  # those tags have no text
        for tag in TAGS:
            expected = expected.replace(tag, "")
    assert (parts.thinking, parts.text) == (thinking, expected)


@pytest.mark.parametrize(("reply", "opened", "thinking", "text"), REPLIES)
def test_split_thinking_knows_the_text_only(reply, opened, thinking, text):
    assert split_thinking(reply, opened) == (thinking, reply if text is None else text)


def test_a_sentence_about_the_tag_is_no_thought():
    for text in ("<think> is a tag, not a thought.", "<think> opens and </think> closes."):
        assert split_thinking(text) == (None, text)


@pytest.mark.parametrize("kind", ["added", "special"])
def test_letters_of_a_tag_are_no_tag(kind):
    """The tag in other tokens than its own neither opens nor closes a block."""
    tokenizer = TOKENIZERS[kind]

    def spelled(text: str) -> list[int]:
        return [t for c in text for t in tokenizer.encode(c, add_special_tokens=False)]

    text = "<think>\na\n</think>\n\nb"
    parts, _ = split(spelled(text), tokenizer)
    assert (parts.thinking, parts.text) == (None, text)
    tokens = [*tokenizer.encode("<think>"), *spelled("a</think>b"), *tokenizer.encode("</think>c")]
    parts, _ = split(tokens, tokenizer)
    assert (parts.thinking, parts.text) == ("a</think>b", "c")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_with_thinking_off_every_tag_is_text(kind):
    tokenizer, text = TOKENIZERS[kind], "<think>\na\n</think>\n\nb"
    parts, _ = split(tokenizer.encode(text), tokenizer, thinking=False)
    shown = text if kind != "special" else "\na\n\n\nb"
    assert (parts.thinking, parts.text) == (None, shown)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("reply", "text", "calls"),
    [
        (CALL, "", 1),
        (f"{CALL}\n{CALL}", "", 2),
        (f"Let me see.\n{CALL}", "Let me see.", 1),
        (f"Let me see.\n\n{CALL}\n", "Let me see.\n", 1),
        (f"{CALL} So.", " So.", 1),
        (f"<think>\nhm\n</think>\n\n{CALL}", "", 1),
        ("No call\n", "No call\n", 0),
    ],
)
def test_calls_of_tools(reply, text, calls, kind, size):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(reply, add_special_tokens=False)
    parts, pieces = split(tokens, tokenizer, size, tools=True)
    assert (parts.text, parts.tool_calls) == (text, [CALLED] * calls)
    assert sum("f" in p for p in pieces if p.part == "tool_call") == calls


@pytest.mark.parametrize("kind", ["added", "text"])
@pytest.mark.parametrize(
    "reply",
    [
        "<tool_call>\n{broken}\n</tool_call>",
        'Text <tool_call>{"name": "f"',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call> and more',
        "Tags: <tool_call> and </tool_call>.",
        "</tool_call>",
        "a\n\n<tool_call>[]</tool_call>",
    ],
)
def test_malformed_calls_stay_text(kind, reply):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(reply, add_special_tokens=False)
    parts, _ = split(tokens, tokenizer, tools=True)
    assert (parts.text, parts.tool_calls) == (reply, [])


def test_without_tools_a_call_is_text():
    tokenizer = TOKENIZERS["added"]
    parts, _ = split(tokenizer.encode(CALL), tokenizer)
    assert (parts.text, parts.tool_calls) == (CALL, [])


@pytest.mark.parametrize(
    "text",
    ["", "[]", '"f"', "{}", '{"name": ""}', '{"name": "f", "arguments": [1]}', "{" * 9999]
    + ['{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {}, "more": 1}'],
)
def test_what_is_no_call(text):
    assert parse_call(text) is None


def test_arguments_of_a_call():
    assert parse_call(' {"name": "f", "arguments": {"a": 1}} ') == CALLED
    assert parse_call('{"name": "f", "arguments": "{\\"a\\": 1}"}') == CALLED
    assert parse_call('{"name": "f"}') == {**CALLED, "function": {"name": "f", "arguments": {}}}
