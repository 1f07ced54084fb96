"""The parts of a reply while it is written: thinking, text, calls of tools, and the tags between.

Tags are tokens where the tokenizer has them as tokens: the same letters put together from other
tokens are text. With other tokenizers tags are found in the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hmf_jax.text.detokenizer import Place, beginning

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, CALL, END_CALL)


class Piece(str):
    """A piece of a reply.

    Attributes:
      part: "thinking", "text", "tool_call", or "tags": tags and the blank lines around them. The
        pieces of one part together are what `Reply` has of it, all pieces are what was written.
    """

    part: str

    def __new__(cls, text: str, part: str) -> Piece:
        piece = super().__new__(cls, text)
        piece.part = part
        return piece


class ReplyParts:
    """Cuts a reply into its parts.

    Args:
      tokens: the token of each tag of `TAGS` that is a token.
      opened: the prompt ends with an open <think>.
      thinking: whether there can be thinking; otherwise its tags are text.
      tools: whether calls of tools are looked for.

    Attributes:
      thinking: None if the model did not think.
      text: the rest, without calls of tools.
      tool_calls: as in messages, see `hmf_jax.text.messages`.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        *,
        opened: bool = False,
        thinking: bool = True,
        tools: bool = False,
    ):
        self.thinking: str | None = "" if opened and thinking else None
        self.text = ""
        self.tool_calls: list[dict[str, Any]] = []
        self._tokens, self._opened, self._tools = tokens, opened, tools
        self._state = self._start if thinking else self._answer
        self._places: list[Place] = []  # of tags that are not in a part yet, or are text
        self._seen = 0  # places that were passed to `push`
        self._rest, self._at = "", 0  # text that is in no part yet, and where it begins
        self._last = False
        self._out: list[Piece] = []

    def push(self, text: str, places: Sequence[Place] = ()) -> list[Piece]:
        """More text, and the places of all tags so far; the pieces that are certain now."""
        self._places += places[self._seen :]
        self._seen = max(self._seen, len(places))
        self._rest += text
        while self._state():
            pass
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Piece]:
        """The rest, once no more text will come."""
        self._last = True
        return self.push("")

    # Each state takes what is certain from the rest, and returns whether another state goes on.

    def _start(self) -> bool:
        """Only blanks so far: thinking may begin."""
        blank = len(self._rest) - len(self._rest.lstrip())
        tag, waits = self._find(THINK)
        if THINK not in self._tokens:
            head = self._rest[blank:]
            waits = f"{THINK}\n".startswith(head)
            if tag is not None and head != THINK and not head.startswith(f"{THINK}\n"):
                tag = None  # not alone in its line
        elif tag is None:
            waits = waits or blank == len(self._rest)
        if waits and not self._last:
            return False
        if tag is not None and tag.start <= blank:
            self.thinking = ""
            self._state = self._thought
            self._take(tag)
            self._emit(tag.end, "tags")
        else:
            self._state = self._thought if self._opened else self._answer
        return True

    def _thought(self) -> bool:
        tag, _ = self._find(END_THINK)
        body = self._rest[: self._certain(END_THINK) if tag is None else tag.start]
        end = len(self._rest) if tag is None else tag.end
        if tag is not None:
            self._take(tag)
        if not self.thinking:
            blank = len(body) - len(body.lstrip())
            self._emit(blank, "tags")
            body, end = body[blank:], end - blank
        said = len(body.rstrip())
        self._emit(said, "thinking")
        if tag is not None or self._last:
            self._emit(end - said, "tags")
        if tag is not None:
            self._state = self._after
        return tag is not None

    def _after(self) -> bool:
        """Line ends after the thinking are not part of the answer."""
        call, _ = self._find(CALL)
        lead = self._rest if call is None else self._rest[: call.start]
        self._emit(len(lead) - len(lead.lstrip("\n")), "tags")
        if self._rest:
            self._state = self._answer
        return bool(self._rest)

    def _answer(self) -> bool:
        if not self._tools:
            self._emit(len(self._rest), "text")
            return False
        tag, _ = self._find(CALL)
        body = self._rest[: self._certain(CALL) if tag is None else tag.start]
        self._emit(len(body.rstrip()), "text")  # blanks may belong to a call
        if tag is not None:
            self._state = self._call
        elif self._last:
            between = self.tool_calls and not self._rest.strip()
            self._emit(len(self._rest), "tags" if between else "text")
        return tag is not None

    def _call(self) -> bool:
        """The rest is blanks, the tag of a call, and what comes after."""
        tag, _ = self._find(CALL)
        end, _ = self._find(END_CALL)
        if tag is None or end is None:
            self._emit(len(self._rest) if self._last else 0, "text")
            return False
        call = parse_call(self._rest[tag.end : end.start])
        self._take(tag)
        self._take(end)
        self._state = self._answer
        if call is None:
            self._emit(end.end, "text")
            return True
        # Templates put one line end between the text and the first call.
        kept = max(tag.start - 1, 0) if self.text and not self.tool_calls else 0
        self._emit(kept, "text")
        self._emit(tag.start - kept, "tags")
        self._emit(end.end - tag.start, "tool_call")
        self.tool_calls.append(call)
        return True

    def _find(self, tag: str) -> tuple[Place | None, bool]:
        """Where the tag is in the rest, and whether a part of it is still to come."""
        token = self._tokens.get(tag)
        if token is None:
            start = self._rest.find(tag)
            return (None if start < 0 else Place(-1, start, start + len(tag))), False
        for place in self._places:
            if place.token == token and place.start >= self._at:
                found = Place(token, place.start - self._at, place.end - self._at)
                return (found, False) if found.end <= len(self._rest) else (None, True)
        return None, False

    def _certain(self, tag: str) -> int:
        """How much of the rest comes before any tag of which a part is still to come."""
        token = self._tokens.get(tag)
        if self._last:
            return len(self._rest)
        if token is None:
            return len(self._rest) - beginning(self._rest, tag)
        starts = (p.start - self._at for p in self._places if p.token == token)
        return min([len(self._rest), *(start for start in starts if start >= 0)])

    def _take(self, tag: Place) -> None:
        """A tag has been dealt with."""
        for place in self._places:
            if place.token == tag.token and place.start >= self._at:
                self._places.remove(place)
                return

    def _emit(self, length: int, part: str) -> None:
        """The first characters of the rest are of this part."""
        text, self._rest = self._rest[:length], self._rest[length:]
        self._at += length
        if part == "thinking":
            self.thinking = (self.thinking or "") + text
        elif part == "text":
            self.text += text
        if text:
            self._out.append(Piece(text, part))


def parse_call(text: str) -> dict[str, Any] | None:
    """The call of a tool in {"name": ..., "arguments": {...}}; None if that is not what it is."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        call = json.loads(text, parse_constant=refuse)
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict) or not set(call) <= {"name", "arguments"}:
        return None
    if not isinstance(call.get("name"), str) or not call["name"]:
        return None
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
