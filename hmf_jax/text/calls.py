"""Calls of tools as models write them: {"name": ..., "arguments": {...}}."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

_Steps = Generator[None, str, Any]  # is sent the characters one by one


def parse_call(text: str) -> dict[str, Any] | None:
    """The call of a tool in {"name": ..., "arguments": {...}}; None if that is not what it is."""
    try:
        call = _json(text)
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = _json(arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict) or not set(call) <= {"name", "arguments"}:
        return None
    if not isinstance(call.get("name"), str) or not call["name"]:
        return None
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


class CallReader:
    """Reads a call while it is written.

    What comes before the arguments has to be right. Of the arguments only strings and brackets are
    understood, which is what it takes to know where they end.

    Attributes:
      name: of the tool, once it is known.
      begun: the arguments have begun, or will not come.
      in_string: the next character is within a string.
      closed: the call is complete.
      broken: the next character cannot be part of a call.
    """

    def __init__(self) -> None:
        self.name = ""
        self.begun = self.in_string = self.closed = self.broken = False
        self._new: list[str] = []
        self._steps = self._call()
        next(self._steps)

    @property
    def started(self) -> bool:
        """Whether it is known which tool is called, and its arguments have begun."""
        return bool(self.name) and self.begun

    def read(self, text: str) -> int:
        """How many of these characters belong to the call: all, unless it is closed or broken."""
        for i, character in enumerate(text):
            if self.closed or self.broken:
                return i
            try:
                self._steps.send(character)
            except StopIteration:
                self.closed = True
            except (ValueError, RecursionError):
                self.broken = True
                return i
        return len(text)

    def arguments(self) -> str:
        """What has been read of the arguments since the last time."""
        new = "".join(self._new)
        self._new.clear()
        return new

    def _call(self) -> _Steps:
        _expect((yield from self._solid()) == "{")
        c = yield from self._solid()
        while c != "}":
            key = yield from self._string(c)
            _expect((yield from self._solid()) == ":")
            c = yield from self._solid()
            if self.started:
                c = yield from self._skipped(c)
            else:
                if key == "name":
                    self.name = yield from self._string(c)
                    _expect(bool(self.name))
                else:
                    _expect(key == "arguments" and not self.begun)
                    yield from self._given(c)
                c = yield from self._solid()
            if c == ",":
                c = yield from self._solid()
                _expect(c != "}")
            else:
                _expect(c == "}")
        _expect(bool(self.name))
        if not self.begun:
            self.begun = True
            self._new.append("{}")

    def _given(self, c: str) -> _Steps:
        """The arguments: an object, or a string that holds the JSON text of one."""
        if c == '"':
            text = yield from self._string(c)
            _expect(isinstance(_json(text), dict))
            self._new.append(text)
            self.begun = True
            return
        _expect(c == "{")
        self.begun = True
        depth, escaped = 0, False
        while True:
            self._new.append(c)
            if escaped:
                escaped = False
            elif self.in_string:
                escaped, self.in_string = c == "\\", c != '"'
            elif c == '"':
                self.in_string = True
            elif c in "{[":
                depth += 1
            elif c in "}]":
                depth -= 1
                if not depth:
                    return
            c = yield

    def _skipped(self, c: str) -> _Steps:
        """A value nobody asked for; the character after it."""
        depth = 0
        while depth or c not in ",}":
            if c == '"':
                yield from self._string(c)
            elif c in "{[":
                depth += 1
            elif c in "}]":
                depth -= 1
            c = yield
        return c

    def _string(self, c: str) -> _Steps:
        _expect(c == '"')
        found, escaped, self.in_string = [c], False, True
        while self.in_string:
            c = yield
            found.append(c)
            self.in_string = escaped or c != '"'
            escaped = not escaped and c == "\\"
        return json.loads("".join(found))

    def _solid(self) -> _Steps:
        """The next character that is no blank."""
        while (c := (yield)) in " \t\r\n":
            pass
        return c


def _expect(right: bool) -> None:
    if not right:
        raise ValueError
