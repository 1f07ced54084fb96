"""What messages and tools may be, and templates that do not behave."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from hmf_jax.demo import build_tokenizer
from hmf_jax.text import ChatSession, ConversationFull, check_messages, load_tokenizer, render
from hmf_jax.text import template as template_module
from hmf_jax.text.messages import check_tools, said
from tests.text.tokenizers import reasoning

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_messages_as_templates_take_them():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": ""},
    ]
    checked = check_messages(messages)
    assert [m["content"] for m in checked] == ["Be brief.", "Hello", "", "", ""]
    assert checked[2]["tool_calls"] == [CALL] and checked[2]["reasoning_content"] == "hm"
    assert "name" not in checked[0] and check_messages(checked) == checked
    openai = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    for call in (openai, CALL["function"]):
        (again,) = check_messages([{"role": "assistant", "tool_calls": [call]}])
        assert again["tool_calls"][0]["function"] == CALL["function"]
    assert (
        said("Hi") == [{"role": "user", "content": "Hi"}] == said({"role": "user", "content": "Hi"})
    )
    assert len(said([{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}])) == 2


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Hi", r"m\[0\] must be a dict with role and content, not 'Hi'"),
        ({"content": "Hi"}, r"m\[0\]: role=None is unknown; use system, developer, user"),
        ({"role": "human", "content": "Hi"}, "role='human' is unknown"),
        ({"role": ["user"], "content": "Hi"}, "role=.*is unknown"),
        ({"role": "user"}, "the content of the user's message is empty"),
        ({"role": "user", "content": ""}, "the content of the user's message is empty"),
        ({"role": "user", "content": []}, "the content of the user's message is empty"),
        ({"role": "system", "content": ""}, "the content of the system's message is empty"),
        ({"role": "user", "content": 5}, r"m\[0\].content must be a string, or a list"),
        ({"role": "user", "content": b"Hi"}, "must be a string"),
        ({"role": "tool", "content": {"a": 1}}, "write values as JSON text"),
        ({"role": "user", "content": "\ud83d"}, "half of a surrogate pair"),
        ({"role": "user", "content": ["Hi"]}, r"m\[0\].content\[0\] is 'Hi'; only"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            r"content\[0\] is a part of type 'image_url'; only",
        ),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"\[0\].text must be"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}, "key 'b'"),
        ({"role": "user", "content": "Hi", "contents": "x"}, "has the key 'contents'"),
        ({"role": "assistant", "content": "Hi", "reasoning": "x"}, "is reasoning_content"),
        ({"role": "assistant", "content": "", "function_call": {}}, "the key 'function_call'"),
        ({"role": "user", "content": "Hi", "tool_calls": [CALL]}, "for messages of the assistant"),
        ({"role": "user", "content": "Hi", "tool_call_id": "1"}, "for messages of the tool"),
        ({"role": "assistant", "reasoning_content": 5}, r"reasoning_content must be a string"),
        ({"role": "assistant", "tool_calls": CALL}, "must be a list of calls"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [{"type": "x"}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [{"name": ""}]}, "name='' must be a string"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
            "arguments must be an object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]},
            "arguments must be an object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]},
            "arguments must be an object",
        ),
        ({"role": "\x1b[2J", "content": "Hi"}, r"\\x1b\[2J"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be(message, error):
    with pytest.raises(ValueError, match=error) as told:
        check_messages([message], "m")
    assert "\n" not in str(told.value) and "\x1b" not in str(told.value)


def test_what_is_no_list_of_messages():
    for messages in ("Hi", {"role": "user", "content": "Hi"}, None, 5, b"x"):
        with pytest.raises(ValueError, match="must be a list of messages"):
            check_messages(messages)
    for message, error in (
        ([], "nothing to answer"),
        ([{"role": "assistant", "content": "a"}], "answers"),
    ):
        with pytest.raises(ValueError, match=error):
            said(message)


def test_tools():
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: one number
            b: another
        """
        return a + b

    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert check_tools(None) == [] and check_tools([schema]) == [schema]
    (found,) = check_tools([add])
    assert found["function"]["name"] == "add"
    assert set(found["function"]["parameters"]["properties"]) == {"a", "b"}

    def silent(a: int) -> int:
        return a

    for tool, error in (
        (silent, r"tools\[0\]: .*docstring"),
        ("f", r"tools\[0\] must be a function"),
        ({"type": "function"}, "must be a function"),
        ({"name": "f", "parameters": {1, 2}}, "is no JSON"),
        ({"name": "f", "x": float("nan")}, "is no JSON"),
    ):
        with pytest.raises(ValueError, match=error):
            check_tools([tool])
    with pytest.raises(ValueError, match="must be a list"):
        check_tools(schema)


# --- templates --------------------------------------------------------------------------------


def with_template(text: Any) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    tokenizer.name_or_path = "some/mod\x1b[2Jel"
    return tokenizer


HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('only\nusers') }}", "fails for this conversation: .*only users"),
        ("{% for m in messages %}", "fails for this conversation: TemplateSyntaxError"),
        ("{{ messages[5].content }}", "fails for this conversation: UndefinedError"),
        ("{{ messages.__class__.__mro__ }}", "fails for this conversation: SecurityError"),
        ("{{ messages[0].content + 1 }}", "fails for this conversation: TypeError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "computes with very large numbers"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "computes with very large numbers"),
        ("{% for i in range(200000) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'x' * 9999999999 }}", "computes with very large numbers"),
        ("{{ '%9999999999d' | format(1) }}", "computes with very large numbers"),
        ("{{ ('x' * 1000) * 100 }}", "writes more than 50,000 characters"),
    ],
)
def test_templates_that_do_not_behave(template, error, monkeypatch):
    monkeypatch.setattr(template_module, "LONGEST", 50_000)
    with pytest.raises(ValueError, match=error) as told:
        render(with_template(template), HI)
    message = str(told.value)
    assert r"some/mod\x1b[2Jel" in message and "\n" not in message and "\x1b" not in message


def test_templates_that_do_not_end(monkeypatch):
    monkeypatch.setattr(template_module, "SECONDS", 0.3)
    loops = "{% for i in range(90000) %}" * 3 + "{% endfor %}" * 3
    start = time.monotonic()
    with pytest.raises(ValueError, match="takes too long or too much memory"):
        render(with_template(loops), HI)
    assert time.monotonic() - start < 10
    monkeypatch.setattr(template_module, "MEMORY", 1 << 27)
    monkeypatch.setattr(template_module, "SECONDS", 10)
    grows = (
        "{% set a = namespace(s=[]) %}{% for i in range(90000) %}"
        "{% set a.s = a.s + ['y' * (1000000 + i)] %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="takes too long or too much memory"):
        render(with_template(grows), HI)


def test_what_a_template_knows_nothing_of(model):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tool = {"name": "f", "parameters": {}}
    with pytest.raises(ValueError, match="no place for tools"):
        ChatSession(model, with_template(plain), tools=[tool])
    with pytest.warns(UserWarning, match="no switch for thinking"):
        ChatSession(model, with_template(plain), thinking=False)
    drops = "{% for m in messages if m.role != 'developer' %}{{ m.content }}{% endfor %}"
    chat = ChatSession(
        model, with_template(drops), messages=[{"role": "developer", "content": "Be!"}]
    )
    with pytest.raises(ValueError, match=r"leaves out messages\[0\], of the developer"):
        chat.send("Hi")


def test_a_template_that_refuses_changes_nothing(model):
    refuses = (
        "{{ raise_exception('no tools') if messages[-1].role == 'tool' }}{{ messages[0].content }}"
    )
    chat = ChatSession(model, with_template(refuses), messages=HI)
    for call in (chat.send, chat.stream):
        with pytest.raises(ValueError, match="no tools"):
            call({"role": "tool", "content": "5"})
    assert chat.messages == HI
    with pytest.raises(ConversationFull, match="capacity of 4096"):
        chat.messages = [{"role": "user", "content": "x" * 9000}]
        chat.send("Hi")


# --- the session's own messages ---------------------------------------------------------------


def test_history_and_system(model):
    tokenizer = reasoning()
    with pytest.raises(ValueError, match="not both"):
        ChatSession(model, tokenizer, system="a", messages=HI)
    with pytest.raises(ValueError, match=r"messages\[0\]: role"):
        ChatSession(model, tokenizer, messages=[{"role": "x", "content": "a"}])
    chat = ChatSession(model, tokenizer, messages=HI)
    assert chat.messages == HI and chat.messages is not HI and chat.system is None
    with pytest.raises(ValueError, match=r"messages\[0\]: the content"):
        chat.messages = [{"role": "user", "content": ""}]
    assert chat.messages == HI
    chat.messages.append({"role": "robot", "content": "a"})  # is noticed when it is used
    with pytest.raises(ValueError, match=r"messages\[1\]: role='robot'"):
        chat.send("Hi")


# --- directories ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer.json", "{", "cannot be loaded"),
        ("tokenizer.json", '{"model": 5}', "cannot be loaded"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "cannot be loaded"),
        ("tokenizer_config.json", '{"chat_template": 5}', None),
        ("special_tokens_map.json", "nonsense", "special_tokens_map.json is not valid JSON"),
        ("chat_template.jinja", "x" * 300_000, "text of at most 262,144 characters"),
    ],
)
def test_damaged_tokenizers(tmp_path, name, content, error):
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    if error is None:  # the template has a file of its own here, which counts
        assert load_tokenizer(tmp_path).chat_template
        (tmp_path / "chat_template.jinja").unlink()
        error = "the chat template in .* must be text"
    with pytest.raises(ValueError, match=error) as told:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


def test_loading_runs_nothing_and_asks_nobody(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    config = tmp_path / "tokenizer_config.json"
    map = '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, '
    config.write_text(map + config.read_text().lstrip().removeprefix("{"))

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    try:
        assert load_tokenizer(tmp_path).encode("Hi") == tokenizer.encode("Hi")
    except ValueError as e:
        assert "cannot be loaded" in str(e)


def test_a_tokenizer_of_another_model(model):
    large = build_tokenizer()
    large.add_tokens([f"<more{i}>" for i in range(20)])
    with pytest.warns(UserWarning, match="tokens with those that were added, and the model 320"):
        chat = ChatSession(model, large)
    with pytest.raises(
        ValueError, match="outside the vocabulary of 320; does the tokenizer belong"
    ):
        chat.send("<more19>")
    from tests.text.tokenizers import byte_fallback

    other = byte_fallback()
    other.chat_template = "{{ messages[0].content }}"
    small = build_tokenizer()
    assert small.vocab_size <= 320
    monkey = type("Large", (), {"vocab_size": 400, "__len__": lambda self: 400})()
    with pytest.raises(ValueError, match="has 400 tokens and the model 320"):
        ChatSession(model, monkey)
