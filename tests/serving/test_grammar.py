"""Structured output: whatever a model would like to write, it keeps to the grammar."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from typing import Any

import numpy as np
import pytest

from hmf_jax import embedded
from hmf_jax.demo import build_tokenizer
from hmf_jax.serving import grammar as grammar_module
from hmf_jax.serving.grammar import Constraint, Grammars, structured_output
from hmf_jax.text import ReplyDeltas, TextStream, load_tokenizer
from hmf_jax.text.parts import TAGS
from hmf_jax.text.tokenizer import tag_ids
from tests.text.tokenizers import byte_fallback, metaspace, reasoning

SIZE = 420  # more than any of the tokenizers has, and no multiple of 32
TOKENIZERS: dict[str, Any] = {
    "demo": build_tokenizer(),
    "tools": reasoning(),
    "embedded": load_tokenizer(embedded.directory("gka")),
    "byte fallback": byte_fallback(),
}
GRAMMARS = {name: Grammars(tokenizer, SIZE) for name, tokenizer in TOKENIZERS.items()}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "dög"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 3},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "count", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


def make(structured: Any, kind: str = "demo", **options: Any) -> Constraint:
    return asyncio.run(GRAMMARS[kind].compile(structured, **options))()


def ids(mask: np.ndarray) -> list[int]:
    assert mask.dtype == np.uint32 and mask.shape == (-(-SIZE // 32),)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def write(constraint: Constraint, kind: str, seed: int = 0) -> list[int]:
    """What somebody writes who knows nothing: any allowed token, until the reply may end."""
    tokenizer, rng, written = TOKENIZERS[kind], random.Random(seed), []
    while len(written) < 2000:
        allowed = ids(constraint.mask())
        assert allowed and max(allowed) < len(tokenizer)
        token = rng.choice(allowed)
        if tokenizer.eos_token_id in allowed and rng.random() < 0.5:
            token = tokenizer.eos_token_id
        constraint.accept([token])
        if token == tokenizer.eos_token_id:
            assert constraint.error is None
            return written
        written.append(token)
    raise AssertionError("it does not end")


def spell(constraint: Constraint, kind: str, text: str) -> bool:
    """Whether the reply may be this text and end there."""
    tokens = TOKENIZERS[kind].encode(text, add_special_tokens=False)
    for token in [*tokens, TOKENIZERS[kind].eos_token_id]:
        if token not in ids(constraint.mask()):
            return False
        constraint.accept([token])
    return True


def check_schema(value: Any) -> None:
    assert set(value) <= {"kind", "count", "name"} and value["kind"] in ("fox", "dög")
    assert 0 <= value["count"] <= 99 and len(value.get("name", "")) <= 3


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_anything_that_is_written_keeps_to_the_schema(kind):
    for seed in range(4):
        written = write(make({"json": SCHEMA}, kind), kind, seed)
        check_schema(json.loads(TOKENIZERS[kind].decode(written)))


def test_kinds_of_grammars():
    words = ["yes", "yes!", 'a "b"\n\\c', "日本", "\x00"]
    for seed in range(6):
        assert TOKENIZERS["demo"].decode(write(make({"choice": words}), "demo", seed)) in words
    for word in words:
        assert spell(make({"choice": words}), "demo", word)
    assert not spell(make({"choice": words}), "demo", "ye")
    date = r"[0-9]{4}-[0-9]{2}"
    assert re.fullmatch(date, TOKENIZERS["demo"].decode(write(make({"regex": date}), "demo")))
    lark = 'start: "a" b+\nb: "b" | "(" b ")"'
    assert spell(make({"grammar": lark}), "demo", "ab((b))")
    assert not spell(make({"grammar": lark}), "demo", "a")
    for text in ("{}", '{"a": [1, {"b": null}]}', '{"a":1,"b":"c"}', '{ "a" : 1 }'):
        assert spell(make({"json_object": True}), "demo", text)
    assert not spell(make({"json_object": True}), "demo", "[1]")
    assert not spell(make({"json_object": True}), "demo", "{  }")  # and so on, for ever
    assert spell(make({"json": json.dumps({"type": "null"})}), "demo", "null")
    assert spell(make({"json": True}), "demo", "[1]")


@pytest.mark.parametrize("kind", ["demo", "tools", "embedded"])
@pytest.mark.parametrize("choice", ["required", {"function": {"name": "count"}}])
def test_calls_of_tools(kind, choice):
    """Tags are tokens of one tokenizer, and text of the others."""
    structured = structured_output(tools=TOOLS, tool_choice=choice, parallel_tool_calls=True)
    tokenizer = TOKENIZERS[kind]
    tags = tag_ids(tokenizer, TAGS)
    for seed in range(4):
        tokens = write(make(structured, kind), kind, seed)
        stream = TextStream(tokenizer, watch={token: tag for tag, token in tags.items()})
        parts = ReplyDeltas(tags, tools=True)
        parts.push(stream.push(tokens, [0.0] * len(tokens)), stream.places)
        parts.push(stream.finish(), stream.places)
        parts.finish()
        assert parts.tool_calls and not parts.text
        for call in parts.tool_calls:
            function = call["function"]
            arguments = json.loads(function["arguments"])
            if function["name"] == "stop":
                assert arguments == {} and choice == "required"
            else:
                check_schema(arguments)
        assert len(parts.tool_calls) == 1 or choice == "required"


def test_how_many_calls_there_may_be():
    def two(**options: Any) -> bool:
        call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
        structured = structured_output(tools=TOOLS, **options)
        assert spell(make(structured, "tools"), "tools", call)
        return spell(make(structured, "tools"), "tools", f"{call}\n{call}")

    assert two(tool_choice="required", parallel_tool_calls=True)
    assert not two(tool_choice="required")
    assert not two(tool_choice={"name": "stop"}, parallel_tool_calls=True)
    # What a response may be, and what it may call instead.
    assert not two(tool_choice="auto", response_format={"type": "json_object"})
    structured = structured_output(tools=TOOLS, response_format={"type": "json_object"})
    assert spell(make(structured, "tools"), "tools", "{}")


def test_the_grammar_holds_after_the_thinking():
    tokenizer = TOKENIZERS["tools"]
    end, call, think = tokenizer.convert_tokens_to_ids(["</think>", "<tool_call>", "<think>"])
    constraint = make({"choice": ["fox"]}, "tools", thinking=True)
    free = ids(constraint.mask())
    assert end in free and think in free and len(free) > len(tokenizer) - 5
    assert tokenizer.eos_token_id not in free and call not in free
    constraint.accept(tokenizer.encode("is it a dog? {"))
    assert ids(constraint.mask()) == free
    constraint.accept([end])
    (newline,) = tokenizer.encode("\n")
    assert newline in ids(constraint.mask())
    for tokens in ([], [newline], [newline, newline]):
        constraint = make({"choice": ["fox"]}, "tools", thinking=True)
        constraint.accept([*tokenizer.encode("dog?"), end, *tokens])
        assert newline not in ids(constraint.mask()) or len(tokens) < 2
        assert spell(constraint, "tools", "fox")
    # Line ends that the grammar has itself are its own.
    constraint = make({"regex": "\nfox"}, "tools", thinking=True)
    constraint.accept([end])
    assert spell(constraint, "tools", "\nfox")
    assert ids(make({"choice": ["fox"]}, "tools").mask()) != free  # at once


def test_a_tag_that_is_no_token_ends_the_thinking_too():
    constraint = make({"choice": ["fox"]}, "embedded", thinking=True)
    tokens = TOKENIZERS["embedded"].encode("a </thin </think> b")
    constraint.accept(tokens[:-3])
    assert len(ids(constraint.mask())) > 250
    constraint.accept(tokens[-3:-2])
    assert spell(constraint, "embedded", "\nfox")


def test_a_reply_can_always_end():
    tokenizer = TOKENIZERS["demo"]
    constraint = make({"choice": ["fox"]})
    constraint.accept(tokenizer.encode("dog"))  # not allowed, but so it came
    assert constraint.error and "<state>" not in constraint.error
    assert ids(constraint.mask()) == [tokenizer.eos_token_id]
    constraint.accept([5, 6])
    assert ids(constraint.mask()) == [tokenizer.eos_token_id]
    done = make({"choice": ["fox"]})
    done.accept(tokenizer.encode("fox"))
    for _ in range(3):  # also where end tokens are ignored
        assert ids(done.mask()) == [tokenizer.eos_token_id]
        done.accept([tokenizer.eos_token_id])
    several = Grammars(tokenizer, SIZE, [0, tokenizer.eos_token_id])
    one = asyncio.run(several.compile({"choice": ["fox"]}))()
    one.accept(tokenizer.encode("fox"))
    assert ids(one.mask()) == [0, tokenizer.eos_token_id]


def test_models_with_fewer_tokens_than_the_tokenizer():
    small = Grammars(TOKENIZERS["demo"], 300, [0])
    mask = asyncio.run(small.compile({"regex": ".*"}))().mask()
    assert mask.shape == (10,) and int(mask[-1]) < 1 << 12


def test_each_reply_has_its_own():
    fresh = asyncio.run(GRAMMARS["demo"].compile({"choice": ["fox"]}))
    one, two = fresh(), fresh()
    one.accept(TOKENIZERS["demo"].encode("fox"))
    assert spell(two, "demo", "fox")


UNSUPPORTED = {"type": "array", "uniqueItems": True}


@pytest.mark.parametrize(
    ("structured", "error"),
    [
        ({"json": UNSUPPORTED}, 'refused: Unimplemented keys: \\["uniqueItems"\\]'),
        ({"json": {"type": "objekt"}}, "Invalid type: objekt"),
        ({"json": {"$ref": "#/nope"}}, "does not exist"),
        ({"json": [1]}, "the schema must be an object"),
        ({"json": "{"}, "the schema is no JSON"),
        ({"regex": "[a-"}, "invalid regex"),
        ({"regex": ""}, "regex must be a text that is not empty"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
        ({"grammar": 5}, "grammar must be a text"),
        ({"grammar": "start: start"}, "refused: there is nothing that satisfies it"),
        ({"json": {"enum": []}}, "Unsatisfiable schema"),
        ({"regex": "x{1000000}"}, "too many expressions"),
        ({"choice": []}, "choice must be a list of texts"),
        ({"choice": ["a", ""]}, "none of which is empty"),
        ({"grammar": "#" * (1 << 20)}, "more than 1,048,576 characters"),
        ({"tools": [{"name": "f", "parameters": {"type": "array"}}]}, r"tools\[0\]\.function"),
        ({"tools": [{"name": "f", "strict": True, "parameters": {"not": {}}}]}, "Unimplemented"),
    ],
)
def test_what_is_no_grammar(structured, error):
    with pytest.raises(ValueError, match=error) as e:
        make(structured)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_keywords_that_are_not_supported_may_be_left_out():
    lenient = {"json_schema": {"schema": UNSUPPORTED}, "type": "json_schema"}
    assert spell(make(structured_output(response_format=lenient)), "demo", "[1, 1]")
    lenient["json_schema"]["strict"] = True
    with pytest.raises(ValueError, match="uniqueItems"):
        make(structured_output(response_format=lenient))
    make({"tools": [{"name": "f", "parameters": {"not": {}}}]})
    either = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    assert spell(make({"json": either, "strict": False}), "demo", "1")


def test_tokenizers_that_are_not_of_bytes():
    with pytest.raises(ValueError, match="structured output does not work with this tokenizer"):
        asyncio.run(Grammars(metaspace(), SIZE).compile({"json_object": True}))


def test_grammars_are_compiled_once_and_in_time(monkeypatch):
    compiled: list[Any] = []

    def slow(self: Grammars, structured: Any) -> Any:
        compiled.append(structured)
        time.sleep(0.3 if "slow" in structured["regex"] else 0)
        return original(self, structured)

    original = Grammars._compiled
    monkeypatch.setattr(Grammars, "_compiled", slow)
    monkeypatch.setattr(grammar_module, "KEPT", 2)
    monkeypatch.setattr(grammar_module, "SECONDS", 0.1)
    grammars = Grammars(TOKENIZERS["demo"], SIZE)

    async def several() -> None:
        for regex in ("a", "b", "a", "c", "a", "b"):  # "b" was not used for the longest time
            await grammars.compile({"regex": regex})
        with pytest.raises(ValueError, match="takes more than 0 seconds"):
            await grammars.compile({"regex": "slow"})

    asyncio.run(several())
    assert [one["regex"] for one in compiled] == ["a", "b", "c", "b", "slow"]
    grammars.close()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"structured_outputs": {}}, "exactly one of json, regex, choice, grammar, json_object"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exactly one"),
        ({"structured_outputs": {"json_object": False}}, "exactly one"),
        ({"response_format": {"type": "xml"}}, "response_format.type='xml' must be"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema is missing"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "give one of them",
        ),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": {"name": "nope"}, "tools": TOOLS}, "'nope', which is not one"),
        (
            {"tool_choice": "required", "tools": TOOLS, "structured_outputs": {"regex": "a"}},
            "cannot be kept to",
        ),
    ],
)
def test_fields_that_contradict(fields, error):
    with pytest.raises(ValueError, match=error):
        structured_output(**fields)


def test_fields_that_ask_for_no_grammar():
    assert structured_output() is None
    assert structured_output(response_format={"type": "text"}, tools=TOOLS) is None
    assert structured_output(tools=TOOLS, tool_choice="auto") is None
    asked = {"structured_outputs": {"regex": "a", "choice": None}, "tools": TOOLS}
    assert structured_output(**asked, tool_choice="none") == {"regex": "a"}
