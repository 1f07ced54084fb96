"""Requests that a server must refuse, each with the status that is right, and odd ones that it must
answer.

What is wrong with a field follows from the JSON schema of the request, so that a new field is tried
from the day it exists.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hmf_jax.serving.load.call import CHAT, COMPLETIONS, Call

# One value of each of JSON's types.
_VALUES: dict[str, Any] = {
    "string": "text",
    "integer": 3,
    "number": 0.5,
    "boolean": True,
    "object": {"a": 1},
    "array": [[]],
}
# What a field takes besides what its schema says.
_ALSO = {"stop": {"string"}, "prompt": {"string"}}
# What is outside the range of a field, by name; of both routes.
_OUTSIDE: dict[str, Sequence[Any]] = {
    "n": [0, -1, 129, 10**6],
    "best_of": [2],
    "max_tokens": [0, -1, 2**31, 10**9],
    "temperature": [-0.1, 2.1, 1e300],
    "top_p": [0, -0.5, 1.5],
    "top_k": [-2, -(2**40)],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1],
    "logit_bias": [{"-1": 1}, {"10000000": 1}, {"x": 1}, {"3": 101}, {"3": "x"}],
    "seed": [2**63, -(2**63) - 1, 1.5],
    "stop": [["a"] * 17, "", "x" * 257, [""], [1], {}],
    "stop_token_ids": [[-1], [10**7], list(range(17)), ["a"]],
    "min_tokens": [-1, 10**6],
    "truncate_prompt_tokens": [0, -2, 10**8],
    "priority": [2**63],
    "cache_salt": ["", "x" * 1025],
    "num_iter": [-1, 1001, 0.5],
    "use_beam_search": [True],
    "stream_options": [{"include_usage": True}],  # without stream
}
_OUTSIDE_OF: dict[str, dict[str, Sequence[Any]]] = {
    COMPLETIONS: {
        "prompt": [[], [[]], [-1], [10**7], [2**63], [0.5], ["a", 1], [["a"]], {"a": 1}, 5],
        "logprobs": [-1, 21],
        "prompt_logprobs": [-1, 21],
        "suffix": ["text"],
    },
    CHAT: {
        "messages": [
            [],
            ["text"],
            [{}],
            [{"role": "alien", "content": "hi"}],
            [{"role": 5, "content": "hi"}],
            [{"content": "hi"}],
            [{"role": "user", "content": 5}],
            [{"role": "user", "content": {"text": "hi"}}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [{"role": "user", "content": [{"type": "text", "text": 5}]}],
            [{"role": "user", "content": "hi"}] * 4097,
        ],
        "max_completion_tokens": [0, -1],
        "top_logprobs": [-1, 21, 3],  # 3: without logprobs
        "tools": [[], [{}], [{"type": "function"}], [{"type": "function", "function": {}}], ["x"]],
        "tool_choice": ["sometimes", {"type": "function", "function": {"name": "nowhere"}}],
        "response_format": [{"type": "xml"}, {"type": "json_schema"}, {}],
        "structured_outputs": [{}, {"json": {}, "regex": "a"}, {"regex": "("}],
        "chat_template": ["{{ messages }}"],
    },
}


def malformed(
    count: int, schemas: Mapping[str, Mapping[str, Any]], *, model: str, seed: int = 0
) -> list[Call]:
    """`count` calls to be refused, every kind once before any comes twice, in random order.

    Args:
      schemas: the JSON schema of the body by path, `CHAT` and `COMPLETIONS`.
      model: its name.
    """
    every = list(_protocol(model))
    for path, schema in schemas.items():
        every += _fields(path, schema, _body(path, model))
    rng = random.Random(seed)
    rng.shuffle(every)
    more = max(0, count - len(every))
    return (every + rng.choices(every, k=more))[:count]


def unusual(count: int, *, model: str, seed: int = 0) -> list[Call]:
    """`count` calls to be answered, whatever fields nobody knows they bring."""
    rng = random.Random(seed)
    calls = []
    for i in range(count):
        path = rng.choice([CHAT, COMPLETIONS])
        name, value = f"unknown_{rng.randrange(100)}", rng.choice([None, *_VALUES.values()])
        nulls = rng.sample(["stop", "seed", "logit_bias", "n", "user", "temperature"], 2)
        body = _body(path, model) | dict.fromkeys(nulls) | {name: value}
        calls.append(Call(body, path, about=f"unusual {i}: {name}, {nulls}"))
    return calls


def _body(path: str, model: str) -> dict[str, Any]:
    """A request that is right."""
    said = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": model, "max_tokens": 1, **said}


def _refused(body: Any, path: str, about: str, status: int = 400, **more: Any) -> Call:
    return Call(body, path, expect=(status,), about=f"{about} at {path}", **more)


def _fields(path: str, schema: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Call]:
    """Every field with values of all types that it does not have, and outside of its range."""
    for name, field in schema.get("properties", {}).items():
        types = _types(field, schema.get("$defs", {}))
        types |= _ALSO.get(name, set()) if types else set()
        wrong = [value for kind, value in _VALUES.items() if kind not in types]
        for value in wrong if types else ():
            yield _refused({**base, name: value}, path, f"{name}={value!r}")
    for name, values in (_OUTSIDE | _OUTSIDE_OF[path]).items():
        for value in values:
            yield _refused({**base, name: value}, path, f"{name}={str(value)[:60]}")


def _types(field: Mapping[str, Any], names: Mapping[str, Any]) -> set[str]:
    """JSON types that a field may have; none: any."""
    if "$ref" in field:
        return _types(names[field["$ref"].rpartition("/")[2]], names)
    if "anyOf" in field:
        parts = [_types(part, names) for part in field["anyOf"]]
        return set().union(*parts) if all(parts) else set()
    kinds = field.get("type", [])
    types = {kinds} if isinstance(kinds, str) else set(kinds)
    if "enum" in field:  # "text" is none of them
        types -= {"string"}
        types |= {"null"}
    return types | ({"integer"} if "number" in types else set())


def _protocol(model: str) -> Iterator[Call]:
    """What is wrong before there are fields."""
    for path in (CHAT, COMPLETIONS):
        right = _body(path, model)
        data = json.dumps(right).encode()
        for about, body in {
            "no body": b"",
            "half a body": data[:-5],
            "something behind": data + b"}",
            "a list": b"[" + data + b"]",
            "a string": b'"text"',
            "null": b"null",
            "no JSON": b"hello",
            "NaN": data[:-1] + b', "temperature": NaN}',
            "Infinity": data[:-1] + b', "top_p": Infinity}',
            "1e999": data[:-1] + b', "temperature": 1e999}',
            "bad UTF-8": data.replace(b"hi", b"\xff\xfe"),
            "half a surrogate pair": data.replace(b"hi", rb"\ud800"),
            "65 deep": data[:-1] + b', "x": ' + b"[" * 65 + b"]" * 65 + b"}",
            "100000 deep": data[:-1] + b', "x": ' + b'{"a":' * 100_000,
            "a long number": data[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
        }.items():
            yield _refused(body, path, about)
        yield _refused({"model": model}, path, "nothing to answer")
        yield _refused({**right, "model": "nobody"}, path, "another model", 404)
        yield _refused(data, path, "text", 415, headers={"Content-Type": "text/plain"})
        yield _refused(b"", path, "GET", 405, method="GET")
        yield _refused(data, path, "PUT", 405, method="PUT")
        yield _refused(b'{"x": "' + b"a" * (33 << 20) + b'"}', path, "33 MiB", 413)
    yield _refused(b"{}", "/v1/nothing", "an unknown path", 404)
    yield _refused(b"", "/v1/models/nobody", "another model", 404, method="GET")
    yield _refused({"tokens": [-1]}, "/detokenize", "a token below 0")
    yield _refused({"tokens": "text"}, "/detokenize", "text instead of tokens")
    yield _refused({}, "/tokenize", "nothing to tokenize")
