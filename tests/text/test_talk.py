"""The interactive chat: commands, a full conversation, interrupts, what a terminal gets to see."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hmf_jax.cli import text as cli
from hmf_jax.text import ConversationFull


class Session:
    """Answers with what was said; holds at most so many messages."""

    def __init__(self, room: int = 100, reason: str = "eos"):
        self.messages: list[dict[str, str]] = []
        self.room, self.reason, self.last = room, reason, None

    def reset(self) -> None:
        self.messages = []

    def forget_oldest(self) -> bool:
        found, self.messages = bool(self.messages), self.messages[2:]
        return found

    def stream(self, text: str) -> Iterator[str]:
        if len(self.messages) + 2 > self.room or text == "too long":
            raise ConversationFull("no room")
        if text == "refused":
            raise ValueError("the chat template refuses")
        return self._reply(text)

    def _reply(self, text: str) -> Iterator[str]:
        yield "so: "
        if text == "interrupt":
            raise KeyboardInterrupt
        self.last = SimpleNamespace(finish_reason=self.reason, tokens=[1, 2])
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"so: {text}"},
        ]
        yield text


@pytest.fixture
def talk(monkeypatch, capsys) -> Callable[..., tuple[bool, str, str]]:
    """Lets lines be typed; whether all was answered, and what was printed. ^C is Ctrl-C."""

    def run(session: Any, *lines: str, people: bool = True) -> tuple[bool, str, str]:
        typed = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(typed, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: people, raising=False)
        fine = cli._talk(session)
        out = capsys.readouterr()
        return fine, out.out, out.err

    return run


def test_lines_are_answered_until_the_end(talk):
    session = Session()
    assert talk(session, "Hi", "", "  Why? ") == (True, "so: Hi\nso: Why?\n\n", "")
    assert talk(session, "/reset", "/exit", "never read") == (True, "", "")
    assert session.messages == []


def test_a_command_that_is_none_is_not_said_to_the_model(talk):
    session = Session()
    fine, out, err = talk(session, "/rest", "/help", "/tmp/file is full?", "/usr/bin")
    assert not fine and "/rest is no command; /help lists them" in err
    assert "/save FILE" in out and len(session.messages) == 4


def test_a_conversation_is_saved_and_loaded(talk, tmp_path):
    session, file = Session(), tmp_path / "chat.jsonl"
    assert talk(session, "Hé", f"/save {file}")[0]
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": session.messages}
    before = file.read_bytes()
    fine, _, err = talk(session, "Again", f"/save {file}", "Go on")
    assert not fine and "File exists" in err and file.read_bytes() == before
    other = Session()
    assert talk(other, f"/load {file}")[0] and other.messages == session.messages[:2]
    file.write_text("{")
    fine, _, err = talk(other, f"/load {file}", "/load nothing.json")
    assert not fine and "not valid JSON" in err and "nothing.json" in err
    assert len(err.strip().splitlines()) == 2


def test_a_full_conversation_forgets_its_oldest_turns(talk):
    session = Session(room=4)
    fine, out, err = talk(session, "1", "2", "3")
    assert fine and out == "so: 1\nso: 2\nso: 3\n\n" and "forgot its oldest turn" in err
    assert [m["content"] for m in session.messages] == ["2", "so: 2", "3", "so: 3"]
    before = list(session.messages)
    fine, _, err = talk(session, "too long", "/help")  # there is no room for it at all
    assert not fine and "no room" in err and session.messages == before


def test_errors_are_said_and_the_chat_goes_on(talk):
    session = Session()
    fine, out, err = talk(session, "refused", "Hi")
    assert not fine and err == "hmf-jax: the chat template refuses\n" and "so: Hi" in out


@pytest.mark.parametrize(
    ("reason", "told"),
    [("length", "after 2 tokens"), ("capacity", "full"), ("stop", ""), ("eos", "")],
)
def test_why_a_reply_ended_is_said(talk, reason, told):
    _, _, err = talk(Session(reason=reason), "Hi")
    assert told in err and bool(told) == bool(err)


def test_ctrl_c_ends_the_reply_and_not_the_chat(talk):
    session = Session()
    assert talk(session, "interrupt", "Hi")[1] == "so: \nso: Hi\n\n"
    fine, out, err = talk(session, "^C", "Hi", "^C", "Hi")
    assert fine and out.count("so: Hi") == 2 and err.count("Ctrl-D or /exit") == 2
    with pytest.raises(KeyboardInterrupt):
        talk(session, "^C", "^C", "Hi")
    with pytest.raises(KeyboardInterrupt):
        talk(session, "^C", "Hi", people=False)


def test_text_cannot_steer_a_terminal(capsys, monkeypatch):
    text = "a\tb\n\x1b[2J\r\x07\x9b31m é日😀 \u202ecba\u2069 👨\u200d👩 \ud800"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cli._show(text)
    shown = "a\tb\n\\x1b[2J\\x0d\\x07\\x9b31m é日😀 \\u202ecba\\u2069 👨\u200d👩 \\ud800"
    assert capsys.readouterr().out == shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    cli._show("\x1b[2J")
    assert capsys.readouterr().out == "\x1b[2J"
