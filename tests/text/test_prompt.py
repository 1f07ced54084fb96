"""Conversations as prompts: what other prompts share of them, and messages as OpenAI has them."""

from __future__ import annotations

from typing import Any

import pytest

from hmf_jax.demo import build_tokenizer
from hmf_jax.text import api_messages, render, render_prompt
from hmf_jax.text.prompt import check_template_kwargs, common
from tests.text.tokenizers import KINDS, REASONING_TEMPLATE, reasoning

TOKENIZER: Any = reasoning()
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Is there a fox?"}
TOOL = {"type": "function", "function": {"name": "fox", "parameters": {"type": "object"}}}
ARGUMENTS = '{"a":  "\\u00e9",\n"b": 1.50}'  # nobody's JSON writer has it like this
CALL = {"id": "1", "type": "function", "function": {"name": "fox", "arguments": ARGUMENTS}}
TEXT = REASONING_TEMPLATE.replace("arguments | tojson", "arguments")


def upto(rendered: Any) -> list[str]:
    """The texts before the cuts."""
    return [TOKENIZER.decode(rendered.tokens[:cut]) for cut in rendered.cuts]


def test_a_prompt_is_cut_where_others_differ():
    rendered = render_prompt(TOKENIZER, [SYSTEM, ASK])
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert rendered.text == f"{head}Is there a fox?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.tokens == TOKENIZER.encode(rendered.text, add_special_tokens=False)
    assert upto(rendered) == [head, f"{head}Is there a fox?<|im_end|>\n"]
    other = render_prompt(TOKENIZER, [SYSTEM, {"role": "user", "content": "? no"}])
    assert other.tokens[: other.cuts[0]] == rendered.tokens[: rendered.cuts[0]]
    longer = [SYSTEM, ASK, {"role": "assistant", "content": "Yes."}, ASK]
    again = render_prompt(TOKENIZER, longer).tokens
    assert again[: rendered.cuts[1]] == rendered.tokens[: rendered.cuts[1]]


@pytest.mark.parametrize("kind", [*KINDS, "tools"])
def test_cuts_are_those_of_whole_texts(kind):
    """That only the ends of long texts are encoded again shows nowhere."""
    tokenizer = reasoning() if kind == "tools" else KINDS[kind]()
    tokenizer.chat_template = REASONING_TEMPLATE.replace("<|im_end|>", tokenizer.eos_token)
    system = {"role": "system", "content": "world hello"}
    said = [f"{tokenizer.eos_token} hello", "hello world", "? \n\n", "", " a", "é日本"]
    for first in said:
        for last in said:
            asked = {"role": "user", "content": first}, {"role": "user", "content": last}
            for add in (False, True):
                options: dict[str, Any] = {"add_special_tokens": add}
                whole = render_prompt(tokenizer, [system, *asked], **options)
                assert whole.tokens == tokenizer.encode(whole.text, **options)
                other = {"role": "user", "content": "!" if first.startswith("?") else "?"}
                before = render(tokenizer, [system, *asked], add_generation_prompt=False)
                texts = (render(tokenizer, [system, other]), before)
                places = {common(whole.tokens, tokenizer.encode(t, **options)) for t in texts}
                assert whole.cuts == tuple(sorted(places - {0}))


def test_tools_are_part_of_what_is_shared():
    without, rendered = (render_prompt(TOKENIZER, [ASK], tools=t) for t in (None, [TOOL]))
    assert '"name": "fox"' in upto(rendered)[0] and upto(without)[0] == "<|im_start|>user\n"


def test_a_system_message_alone_is_cut_before_the_reply_only():
    assert upto(render_prompt(TOKENIZER, [SYSTEM])) == ["<|im_start|>system\nBe brief.<|im_end|>\n"]


def test_whether_the_prompt_says_how_to_think():
    asked = render_prompt(TOKENIZER, [ASK])
    off = render_prompt(TOKENIZER, [ASK], enable_thinking=False)
    assert (asked.thinking, asked.closed) == (False, False)
    assert (off.thinking, off.closed) == (False, True)
    assert asked.cuts == off.cuts
    opens = REASONING_TEMPLATE.replace(
        "assistant\n{% if enable", "assistant\n<think>\n{% if enable"
    )
    opened = render_prompt(TOKENIZER, [ASK], template=opens)
    assert (opened.thinking, opened.closed) == (True, False)
    # What a user writes opens nothing.
    for tag in ("<think>", "</think>"):
        said = render_prompt(TOKENIZER, [{"role": "user", "content": tag}])
        assert (said.thinking, said.closed) == (False, False)


def test_tags_that_are_no_tokens_are_found_in_the_text():
    backend = build_tokenizer().backend_tokenizer
    stored = backend.to_str().replace('"<think>"', '"<t1>"').replace('"</think>"', '"<t2>"')
    other = build_tokenizer()
    other._tokenizer = type(backend).from_str(stored)
    assert other.convert_tokens_to_ids("<think>") is None
    assert render_prompt(other, [ASK], enable_thinking=False).closed


def test_the_last_message_goes_on():
    begun = {"role": "assistant", "content": "There is"}
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    rendered = render_prompt(TOKENIZER, [ASK, begun], **options)
    assert rendered.text.endswith("assistant\nThere is") and len(rendered.cuts) == 2
    thought = {"role": "assistant", "content": "<think>\nA fox"}
    assert render_prompt(TOKENIZER, [ASK, thought], **options).thinking
    assert render_prompt(TOKENIZER, [begun], **options).text.endswith("There is")
    with pytest.raises(ValueError, match="needs add_generation_prompt=False"):
        render_prompt(TOKENIZER, [ASK, begun], continue_final_message=True)
    with pytest.raises(ValueError, match="a last message that is not empty"):
        render_prompt(TOKENIZER, [ASK, {"role": "assistant", "content": ""}], **options)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"chat_template": "x"}, "kwargs: 'chat_template' is no option"),
        ({"tokenize": True}, "'tokenize' is no option"),
        ({"messages": []}, "'messages' is no option"),
        ({"tools": []}, "'tools' is no option"),
        ({"a b": 1}, "'a b' is no option"),
        ({"enable_thinking": "no"}, "enable_thinking='no' must be true or false"),
    ],
)
def test_options_that_are_not_the_templates(kwargs, error):
    with pytest.raises(ValueError, match=error):
        check_template_kwargs(kwargs)


def test_arguments_are_written_as_they_were_sent():
    """What the model wrote is read again, to the byte, unless the template needs objects."""
    messages = api_messages([ASK, {"role": "assistant", "tool_calls": [CALL]}])
    assert ARGUMENTS in render_prompt(TOKENIZER, messages, template=TEXT).text
    assert '"arguments": {"a": "é", "b": 1.5}}' in render_prompt(TOKENIZER, messages).text
    broken = [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "fox"}}]}]
    broken[1]["tool_calls"][0]["function"]["arguments"] = '{"a": '
    assert (
        '"arguments": {"a": }' in render_prompt(TOKENIZER, api_messages(broken), template=TEXT).text
    )
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"):
        render_prompt(TOKENIZER, api_messages(broken))


def test_messages_of_the_interface():
    sent = [
        {"role": "developer", "content": [{"type": "text", "text": t} for t in ("Be ", "kind.")]},
        {"role": "user", "content": "", "name": "Ada", "extra": 1},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "Three.", "tool_calls": [], "reasoning_content": "so"},
    ]
    assert api_messages(sent) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "", "name": "Ada"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "Three.", "reasoning_content": "so"},
    ]


def call(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**CALL, **changes}]}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Hi", r"messages\[0\] must be an object"),
        ({"content": "Hi"}, r"messages\[0\]\.role must be one of system, developer, user"),
        ({"role": "human", "content": "Hi"}, r"messages\[0\]\.role must be one of .* not 'human'"),
        ({"role": ["user"], "content": "Hi"}, r"messages\[0\]\.role"),
        ({"role": "user"}, r"messages\[0\]\.content is missing"),
        ({"role": "user", "content": 5}, r"messages\[0\]\.content must be a string"),
        ({"role": "user", "content": "\ud83d"}, r"messages\[0\]\.content holds half"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\] is a part of type"),
        ({"role": "user", "content": "a", "name": 1}, r"messages\[0\]\.name must be a string"),
        ({"role": "tool", "content": "a", "tool_call_id": 1}, r"messages\[0\]\.tool_call_id"),
        ({"role": "assistant", "reasoning": 1}, r"messages\[0\]\.reasoning must be a string"),
        ({"role": "assistant", "tool_calls": 1}, r"messages\[0\]\.tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [1]}, r"tool_calls\[0\] must be \{"),
        (call(type="code"), r"tool_calls\[0\]\.type must be \"function\", not 'code'"),
        (call(id=1), r"tool_calls\[0\]\.id must be a string"),
        (call(function={"name": 1}), r"tool_calls\[0\]\.function\.name must be a string"),
        (call(function={"name": "f", "arguments": 1}), r"function\.arguments must be the JSON"),
    ],
)
def test_what_is_no_message_of_the_interface(message, error):
    with pytest.raises(ValueError, match=error):
        api_messages([message])


@pytest.mark.parametrize("messages", [[], "Hi", None, {"role": "user"}, [ASK] * 4097])
def test_what_is_no_list_of_messages(messages):
    with pytest.raises(ValueError, match="messages must"):
        api_messages(messages)
