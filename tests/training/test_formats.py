"""Rows of the usual formats: what is trained of each, and what is said of those that cannot be."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from hmf_jax.demo import build_tokenizer
from hmf_jax.training import Documents, encode_chat, encode_completion

TOKENIZER: Any = build_tokenizer()
U, A = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}
S = {"role": "system", "content": "Be kind."}
END = "<|im_end|>"
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"name": "add", "arguments": {"x": 1}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": CALL}]}
CALLED = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>{END}"
RESULT = {"role": "tool", "tool_call_id": "c", "content": "2"}
SHAREGPT = [
    {"from": "human", "value": "ask"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "2"},
    {"from": "gpt", "value": "reply"},
]


def learnt(document: Any) -> list[str]:
    """The runs of targets of a document, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.targets, [0]]).astype(int)))
    return [TOKENIZER.decode(document.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def written(messages: list[Any], **options: Any) -> str:
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


PLAIN = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
WITH_TOOLS = written([U, PLAIN, RESULT, A], tools=TOOLS)


@pytest.mark.parametrize(
    ("row", "whole", "targets"),
    [
        ({"text": "fine", "id": 3}, f"fine{END}", None),
        ({"text": '[{"role": "user"}]'}, f'[{{"role": "user"}}]{END}', None),
        ({"messages": None, "text": "fine"}, f"fine{END}", None),
        ({"prompt": "2 + 2 =", "completion": " 4"}, f"2 + 2 = 4{END}", [f" 4{END}"]),
        (
            {"prompt": [U, A, U], "completion": [A]},
            written([U, A, U, A]),
            [f"reply{END}"],
        ),
        ({"prompt": json.dumps([U]), "completion": json.dumps([A])}, written([U, A]), None),
        ({"messages": json.dumps([U, A])}, written([U, A]), [f"reply{END}"]),
        ({"messages": [{**U, "name": None}, A]}, written([U, A]), [f"reply{END}"]),
        ({"messages": [A, U, A]}, written([A, U, A]), [f"reply{END}"] * 2),
        ({"messages": [S, A, U]}, written([S, A, U]), [f"reply{END}"]),
        ({"messages": [U, {**A, "weight": 0}, U, {**A, "weight": 1}]}, None, [f"reply{END}"]),
        ({"messages": [U, {**A, "train": False}, U, {**A, "loss": True}]}, None, [f"reply{END}"]),
        ({"messages": [{**U, "weight": 0}, A]}, written([U, A]), [f"reply{END}"]),
        (
            {"messages": [{**U, "content": [{"type": "text", "text": t} for t in "ab"]}, A]},
            written([{**U, "content": "ab"}, A]),
            [f"reply{END}"],
        ),
        (
            {"messages": [U, CALLS, RESULT, A], "tools": TOOLS, "parallel_tool_calls": True},
            WITH_TOOLS,
            [CALLED, f"reply{END}"],
        ),
        (
            {
                "messages": [
                    U,
                    {**A, "content": None, "function_call": {**CALL, "arguments": '{"x": 1}'}},
                    {"role": "function", "name": "add", "content": "2"},
                    A,
                ],
                "functions": [FUNCTION],
            },
            WITH_TOOLS,
            [CALLED, f"reply{END}"],
        ),
        ({"conversations": SHAREGPT, "tools": json.dumps([FUNCTION])}, WITH_TOOLS, None),
        ({"conversations": SHAREGPT[::3], "system": "Be kind."}, written([S, U, A]), None),
        ({"messages": [S, U, A], "system": S["content"]}, written([S, U, A]), None),
        (
            {
                "instruction": "Add",
                "input": "1 1",
                "output": "2",
                "system": "Be kind.",
                "history": [["ask", "reply"]],
                "images": [],
            },
            written([S, U, A, {**U, "content": "Add\n1 1"}, {**A, "content": "2"}]),
            [f"reply{END}", f"2{END}"],
        ),
    ],
)
def test_what_is_trained(row, whole, targets):
    document = Documents([row], TOKENIZER)[0]
    assert document.bad is None, document.why
    if whole is not None:
        assert TOKENIZER.decode(document.tokens) == whole
    assert targets is None or learnt(document) == targets


@pytest.mark.parametrize(
    ("row", "bad", "why"),
    [
        ({"text": " \n"}, "empty", "empty text"),
        ({"text": None}, "empty", "nothing in its columns: 'text'"),
        ({"messages": []}, "empty", "no messages"),
        ({"instruction": "a", "output": ""}, "empty", "empty instruction or output"),
        ({"instruction": "a", "response": "b"}, "malformed", "without output: there are .*'resp"),
        ({"prompt": "a", "completion": " "}, "empty", "empty completion"),
        ({"messages": [U, {**A, "weight": 0}]}, "empty", "no reply of weight 1"),
        ({"text": 3}, "malformed", "text must be a text: this is a number"),
        ({"body": "x"}, "malformed", "no column text, messages, .* there are 'body'"),
        (["text"], "malformed", "a row must be an object with columns: this is a list"),
        ({"completion": "x"}, "malformed", "a completion without prompt"),
        ({"prompt": "x", "completion": [A]}, "malformed", "these are a text and a list"),
        (
            {"prompt": json.dumps([U]), "completion": "x"},
            "malformed",
            "these are a list and a text",
        ),
        (
            {"messages": [U, A], "chat_template_kwargs": {"tokenize": True}},
            "malformed",
            "no variables of a chat template: tokenize",
        ),
        ({"messages": "a chat"}, "malformed", "messages: no JSON"),
        ({"messages": '"a chat"'}, "malformed", "messages must be a list: this is a text"),
        ({"messages": {"role": ["user"]}}, "malformed", "must be a list: this is an object"),
        ({"messages": [3]}, "malformed", "with role and content: this is a number"),
        ({"messages": [U]}, "malformed", "no message of the assistant"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "malformed", "unknown role: 'robot'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "malformed", "unknown role"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "malformed", "role: 'alien'"),
        ({"conversations": [{"from": "gpt", "content": "a"}]}, "malformed", "both from and role"),
        ({"messages": [U, {**A, "content": None}]}, "malformed", "no content in a message of"),
        ({"messages": [{**U, "content": {"a": 1}}, A]}, "malformed", "content must be a text"),
        ({"messages": [{**U, "content": ["a"]}, A]}, "malformed", "content part must be"),
        ({"messages": [U, {**A, "weight": 2}]}, "malformed", "weight .* must be 0 or 1: this is 2"),
        ({"messages": [U, {**A, "weight": True}]}, "malformed", "must be 0 or 1: this is True"),
        ({"messages": [U, {**A, "weight": float("nan")}]}, "malformed", "0 or 1: this is nan"),
        ({"messages": [U, {**A, "train": 0}]}, "malformed", "must be true or false: this is 0"),
        ({"messages": [U, {**A, "weight": 1, "train": False}]}, "malformed", "contradict"),
        ({"messages": [{**U, "weight": 1}, A]}, "malformed", "weight 1 in a message of the user"),
        ({"messages": [U, A], "system": "Other"}, None, ""),
        ({"messages": [S, U, A], "system": "Other"}, "malformed", "two system prompts"),
        (
            {"messages": [U, {**U, "tool_calls": [CALL]}, A]},
            "malformed",
            "only the assistant calls",
        ),
        (
            {"messages": [U, {**A, "tool_calls": [{"function": {}}]}]},
            "malformed",
            "without the name",
        ),
        (
            {"messages": [U, {**A, "tool_calls": [{**CALL, "arguments": "{x"}]}]},
            "malformed",
            "arguments of a tool call: no JSON",
        ),
        (
            {"messages": [U, {**A, "tool_calls": [{**CALL, "arguments": "[1]"}]}]},
            "malformed",
            "arguments of a tool call must be an object: these are a list",
        ),
        ({"messages": [U, {**CALLS, "function_call": CALL}]}, "malformed", "both tool_calls and"),
        ({"messages": [U, A], "tools": "add"}, "malformed", "tools: no JSON"),
        ({"messages": [U, A], "tools": ["add"]}, "malformed", "tools must be a list of objects"),
        (
            {"conversations": [*SHAREGPT[:1], {"from": "function_call", "value": "add"}]},
            "malformed",
            "function_call: no JSON",
        ),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "malformed", "list of pairs"),
        ({"messages": [{**U, "content": [{"type": "image_url"}]}, A]}, "refused", "'image_url'"),
        ({"messages": [U, {**A, "content": None, "refusal": "no"}]}, "refused", "'refusal'"),
    ],
)
def test_what_is_wrong_with_a_row(row, bad, why):
    document = Documents([row], TOKENIZER)[0]
    assert document.bad == bad and re.search(why, document.why), document.why
    assert bool(len(document.tokens)) == (bad is None) and document.where == "row 0"
    assert document.tokens.dtype == np.int32 and document.targets.dtype == bool


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"instruction": "a", "output": "b", "kto_tag": False}, "'kto_tag': preference data"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "'chosen': preference data"),
        ({"prompt": "a", "completion": "b", "label": True}, "'label': preference data"),
        ({"input": {}, "preferred_output": [A]}, "'preferred_output': preference data"),
        ({"messages": [U, A], "images": ["a.png"]}, "'images': only text is trained"),
        ({"messages": [U, A], "text": "a"}, "more than one format: 'text', 'messages'; say which"),
    ],
)
def test_data_that_are_not_trained_are_an_error(row, why):
    with pytest.raises(ValueError, match=f"^row 0: column.*{why}"):
        Documents([row], TOKENIZER)
    later = Documents([{"text": "a"}, row], TOKENIZER)[1]
    assert later.bad == "refused" and re.search(why, later.why)


def test_columns():
    """A column that is named comes before the formats; a mapping names the columns of a format."""
    row = {"messages": [U, A], "text": "a text", "chat": json.dumps([U, A]), "question": "why"}
    for column, targets in {"messages": f"reply{END}", "chat": f"reply{END}"}.items():
        assert learnt(Documents([row], TOKENIZER, column)[0]) == [targets]
    assert TOKENIZER.decode(Documents([row], TOKENIZER, "text")[0].tokens) == f"a text{END}"
    asked = {"question": "2 + 2 =", "answer": " 4", "prompt": "not this"}
    names = {"prompt": "question", "completion": "answer"}
    assert learnt(Documents([asked], TOKENIZER, names)[0]) == [f" 4{END}"]
    both = {"instruction": "ask", "output": "reply", "text": "ask reply"}  # as the original alpaca
    with pytest.raises(ValueError, match="say which one with `column`, for example {'instruction'"):
        Documents([both], TOKENIZER)
    names = {"instruction": "instruction"}
    assert learnt(Documents([both], TOKENIZER, names)[0]) == [f"reply{END}"]
    names = {"prompt": "question", "completion": "answer"}
    assert "no column 'answer'" in Documents([row], TOKENIZER, names)[0].why
    assert "nothing in column 'none'" in Documents([row], TOKENIZER, "none")[0].why
    with pytest.raises(ValueError, match=r"column maps \['question'\]; it can map "):
        Documents([row], TOKENIZER, {"question": "question"})


def test_the_format_is_that_of_the_first_row():
    rows = [{"text": None}, {"text": "a"}, {"messages": [U, A]}, {"text": "b", "id": 1}]
    documents = Documents(rows, TOKENIZER)
    assert [documents[i].bad for i in range(4)] == ["empty", None, "refused", None]
    assert "another format than row 1: 'messages', not 'text'" in documents[2].why
    rows = [{"messages": [{**U, "lang": "en"}, A], "prompt": "ask"}, {"messages": [U, A], "id": 1}]
    said = Documents(rows, TOKENIZER).describe()
    assert said == "list: 2 rows of format 'messages'; not used: 'prompt', 'messages.lang', 'id'"


IGNORES = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('no question') }}{% endif %}"
    + TOKENIZER.chat_template
)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "why"),
    [
        (IGNORES, [U, A], TOOLS, "leaves out tools"),
        (IGNORES, [U, CALLS], None, "leaves out tool_calls"),
        (IGNORES, [U, {**A, "reasoning_content": "hm"}], None, "leaves out reasoning_content"),
        (
            IGNORES.replace("in messages", "in messages if m.role != 'system'"),
            [S, U, A],
            None,
            "leaves out or changes a message: the system's",
        ),
        (STRICT, [A, U, A], None, "the chat template refuses the conversation: no question"),
        (None, [U, A], None, "the tokenizer has no chat template"),
    ],
)
def test_templates_that_leave_something_out(monkeypatch, template, messages, tools, why):
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    if template is not None and "generation_prompt" not in template:
        prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
        monkeypatch.setattr(TOKENIZER, "chat_template", template + prompt)
    with pytest.raises(ValueError, match=why):
        encode_chat(TOKENIZER, messages, tools)


def test_templates_that_do_not_end(monkeypatch):
    monkeypatch.setattr("hmf_jax.text.template.SECONDS", 0.2)
    loops = "{% for i in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
    for template, why in ((loops, "takes too long"), ("{{ 'a' * 10**9 }}", "template")):
        monkeypatch.setattr(TOKENIZER, "chat_template", template)
        with pytest.raises(ValueError, match=why):
            Documents([{"messages": [U, A]}], TOKENIZER)


GENERATION = """\
{%- for m in messages %}{{ m.role }}: {% if m.role == 'assistant' -%}
{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}
{%- else -%}{{ m.content }}<|im_end|>{%- endif %}{% endfor -%}"""


def test_weights_with_generation_blocks(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", GENERATION)
    rows = [{"messages": [U, {**A, "weight": w}, U, {**A, "content": "two"}]} for w in (0, 1)]
    found = [learnt(Documents([row], TOKENIZER)[0]) for row in rows]
    assert found == [[f"two{END}"], [f"reply{END}", f"two{END}"]]
    once = GENERATION.replace("'assistant' -", "'assistant' and loop.last -")
    monkeypatch.setattr(TOKENIZER, "chat_template", once)
    with pytest.raises(ValueError, match="one generation block per reply.* writes 1 for 2"):
        encode_chat(TOKENIZER, rows[0]["messages"])


# As Qwen3's: thinking since the last question, of replies that think or are the last; tools as
# JSON; what several tools return stands in one turn of the user.
QWEN = """\
{%- set at = namespace(question=messages | length) -%}
{%- for m in messages if m.role == 'user' %}{% set at.question = messages.index(m) %}{% endfor -%}
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- elif m.role != 'assistant' -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else -%}
{%- set thought = m.reasoning_content or '' -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > at.question and (loop.last or thought) -%}
{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + m.content.lstrip('\\n') }}
{%- else %}{{ m.content }}{% endif -%}
{%- for c in m.tool_calls or [] -%}
{{ '\\n<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}"""


def talk(rng: random.Random, thinking: bool) -> list[dict[str, Any]]:
    """A random conversation: several questions, each answered after some rounds of tool calls."""
    messages: list[dict[str, Any]] = [S] if rng.random() < 0.3 else []
    words = ("ok", "a b", "\nline", "so <think> it", "é", "7")
    messages += [{**A, "content": "Hello"}] if rng.random() < 0.2 else []
    for turn in range(rng.randint(1, 3)):
        messages.append({**U, "content": f"{turn} {rng.choice(words)}"})
        for _ in range(rng.randint(0, 2)):
            call = {**CALLS, "tool_calls": [{"function": {**CALL, "arguments": {"x": turn}}}]}
            call |= {"reasoning_content": "hm"} if thinking and rng.random() < 0.5 else {}
            messages += [call, *[RESULT] * rng.randint(1, 2)]
        reply = {**A, "content": rng.choice(words)}
        reply |= {"reasoning_content": "because"} if thinking and rng.random() < 0.5 else {}
        reply |= {"weight": 0} if rng.random() < 0.2 and turn else {}
        messages.append(reply)
    return messages


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_replies_of_a_template_like_qwen3(monkeypatch, options):
    """Whatever the template writes between an assistant's header and its end is learnt, but for
    the empty thinking that the prompt has written already."""
    monkeypatch.setattr(TOKENIZER, "chat_template", QWEN)
    for seed in range(60):
        messages = talk(random.Random(seed), thinking=not options)
        document = Documents([{"messages": messages, "tools": TOOLS}], TOKENIZER, None, options)[0]
        assert document.bad is None, (seed, document.why)
        whole = TOKENIZER.decode(document.tokens)
        said = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", whole, re.DOTALL)
        weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
        expected = [text for text, weight in zip(said, weights, strict=True) if weight]
        if options:
            expected = [text.removeprefix("<think>\n\n</think>\n\n") for text in expected]
        assert learnt(document) == expected, seed
    if options:
        with pytest.raises(ValueError, match="a reply with thinking: the generation prompt ends"):
            encode_chat(TOKENIZER, [U, {**A, "reasoning_content": "hm"}], **options)


def test_completions():
    """A token with parts of both is learnt; the tokenizer's own end token is not doubled."""
    both = TOKENIZER.encode(" the")
    assert len(both) == 1
    assert encode_completion(TOKENIZER, "The fox", " the") == (
        [*TOKENIZER.encode("The fox"), *both, TOKENIZER.eos_token_id],
        [False] * len(TOKENIZER.encode("The fox")) + [True, True],
    )
    tokens, targets = encode_completion(TOKENIZER, " t", f"he{END}")
    assert tokens == [*both, TOKENIZER.eos_token_id] and targets == [False, True]
