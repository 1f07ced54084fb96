"""The parts of a reply while it is written: thinking, text, calls of tools, and the tags between.

Tags are tokens where the tokenizer has them as tokens: the same letters put together from other
tokens are text. With other tokenizers tags are found in the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hmf_jax.text.calls import CallReader, parse_call
from hmf_jax.text.detokenizer import Place, beginning

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, CALL, END_CALL)


class Cutter[Part]:
    """Cuts a reply where its parts begin and end; subclasses say what becomes of the pieces.

    A call of a tool begins once it is known which tool it calls: until then it may turn out to be
    text. Within thinking, the tag of a call that "{" follows ends the thinking.

    Args:
      tokens: the token of each tag of `TAGS` that is a token.
      opened: the prompt ends with an open <think>.
      thinking: whether there can be thinking; otherwise its tags are text.
      tools: whether calls of tools are looked for.

    Attributes:
      thinking: None if the model did not think.
      text: the rest, without calls of tools.
      tool_calls: what the model calls, one dict per call.
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
        self._seen = 0  # places that were passed to `_cut`
        self._rest, self._at = "", 0  # text that is in no part yet, and where it begins
        self._reader: CallReader | None = None
        self._read = 0  # how much of the whole text the reader of a call has seen
        self._last = False
        self._out: list[Part] = []  # what is certain and has not been given

    def push(self, text: str, places: Sequence[Place] = ()) -> list[Part]:
        """More text, and the places of all tags so far; what is certain now."""
        self._cut(text, places)
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Part]:
        """The rest, once no more text will come."""
        self._last = True
        return self.push("")

    def _keep(self, text: str, part: str) -> None:
        """A piece of the reply, see `Piece`."""
        if part == "thinking":
            self.thinking = (self.thinking or "") + text
        elif part == "text":
            self.text += text

    def _begin_call(self, name: str) -> None:
        """A call begins: its pieces follow, among them perhaps the blanks before it."""

    def _add_arguments(self, text: str) -> None:
        """More of the arguments of the call."""

    def _end_call(self, complete: bool) -> None:
        """The call is over; `complete`: its end tag has come."""

    def _cut(self, text: str, places: Sequence[Place] = ()) -> None:
        """More text, and the places of all tags so far."""
        self._places += places[self._seen :]
        self._seen = max(self._seen, len(places))
        self._rest += text
        while self._state():
            pass

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
        end, _ = self._find(END_THINK)
        call = self._find(CALL)[0] if self._tools else None
        if call is not None and (end is None or call.start < end.start):
            return self._call_in_thought(call, end)
        if end is None:
            tags = (END_THINK, CALL) if self._tools else (END_THINK,)
            certain = min(self._certain(tag) for tag in tags)
        else:
            certain = end.start
            self._take(end)
            self._state = self._after
        blanks = self._think(certain)
        if end is not None or self._last:
            self._emit(blanks + (0 if end is None else end.end - end.start), "tags")
        return end is not None

    def _call_in_thought(self, call: Place, end: Place | None) -> bool:
        """A tag of a call comes before the thinking ends: perhaps it is only mentioned."""
        after = self._rest[call.end : None if end is None else end.start].lstrip()
        if after.startswith("{"):
            self._emit(self._think(call.start), "tags")
            self._state = self._call
        elif after or end is not None or self._last:
            self._take(call)
            self._think(call.end)
        else:
            self._think(call.start)
            return False
        return True

    def _think(self, length: int) -> int:
        """The first characters are thoughts; how many blanks are left that may be the last ones."""
        if not self.thinking:
            blank = length - len(self._rest[:length].lstrip())
            self._emit(blank, "tags")
            length -= blank
        said = len(self._rest[:length].rstrip())
        self._emit(said, "thinking")
        return length - said

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
        """The rest is blanks, the tag of a call, and what comes after: perhaps no call at all."""
        tag, _ = self._find(CALL)
        assert tag is not None
        if self._reader is None:
            self._reader, self._read = CallReader(), self._at + tag.end
        reader, ended = self._reader, self._let_read()
        if reader.started:
            self._take(tag)
            self._state = self._called
            # Templates put one line end between the text and the first call.
            kept = max(tag.start - 1, 0) if self.text and not self.tool_calls else 0
            self._emit(kept, "text")
            self._begin_call(reader.name)
            self._emit(tag.start - kept, "tags")
        elif ended or reader.broken or self._last:
            self._take(tag)
            self._state, self._reader = self._answer, None
            self._emit(tag.end, "text")
        else:
            return False
        return True

    def _called(self) -> bool:
        """A call has begun. What stands between its last brace and its end tag is left out."""
        assert self._reader is not None
        self._let_read()
        self._emit(self._read - self._at, "tool_call")
        if arguments := self._reader.arguments():
            self._add_arguments(arguments)
        end, _ = self._find(END_CALL)
        over = self._reader.closed or self._reader.broken
        another = self._find(CALL)[0] if over else None
        if another is not None and (end is None or another.start < end.start):
            end = None  # it has no end tag
        elif end is not None:
            self._take(end)
            self._emit(end.end, "tool_call")
        elif not self._last:
            return False
        self._state, self._reader = self._answer, None
        self._end_call(end is not None)
        return True

    def _let_read(self) -> bool:
        """The reader of the call reads what is certain; whether it has come to the end tag.

        Within a string the end tag is a part of it.
        """
        reader = self._reader
        assert reader is not None
        while True:
            start = self._read - self._at
            end, _ = self._find(END_CALL, start)
            stop = self._certain(END_CALL, start) if end is None else end.start
            self._read += reader.read(self._rest[start:stop])
            if end is None or not reader.in_string or reader.broken:
                return end is not None
            self._take(end)
            self._read += reader.read(self._rest[end.start : end.end])

    def _find(self, tag: str, after: int = 0) -> tuple[Place | None, bool]:
        """Where the tag is in the rest, and whether a part of it is still to come."""
        token = self._tokens.get(tag)
        if token is None:
            start = self._rest.find(tag, after)
            return (None if start < 0 else Place(-1, start, start + len(tag))), False
        for place in self._places:
            if place.token == token and place.start >= self._at + after:
                found = Place(token, place.start - self._at, place.end - self._at)
                return (found, False) if found.end <= len(self._rest) else (None, True)
        return None, False

    def _certain(self, tag: str, after: int = 0) -> int:
        """How much of the rest comes before any tag of which a part is still to come."""
        token = self._tokens.get(tag)
        if self._last:
            return len(self._rest)
        if token is None:
            return len(self._rest) - beginning(self._rest[after:], tag)
        starts = (p.start - self._at for p in self._places if p.token == token)
        return min([len(self._rest), *(start for start in starts if start >= after)])

    def _take(self, tag: Place) -> None:
        """A tag has been dealt with."""
        place = Place(tag.token, tag.start + self._at, tag.end + self._at)
        if place in self._places:
            self._places.remove(place)

    def _emit(self, length: int, part: str) -> None:
        """The first characters of the rest are of this part."""
        text, self._rest = self._rest[:length], self._rest[length:]
        self._at += length
        if text:
            self._keep(text, part)


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


class ReplyParts(Cutter[Piece]):
    """The parts of a reply, and the pieces they are made of; arguments and attributes: `Cutter`.

    A call of a tool is one piece, and given when it is complete: what is malformed stays text.
    `tool_calls` are as in messages, see `hmf_jax.text.messages`.
    """

    _held: list[Piece] | None = None  # of a call that is not complete

    def _keep(self, text: str, part: str) -> None:
        if self._held is not None:
            self._held.append(Piece(text, part))
            return
        super()._keep(text, part)
        self._out.append(Piece(text, part))

    def _begin_call(self, name: str) -> None:
        self._held = []

    def _end_call(self, complete: bool) -> None:
        held, self._held = self._held or [], None
        written = "".join(piece for piece in held if piece.part == "tool_call")
        body = written.removeprefix(CALL).removesuffix(END_CALL)
        call = parse_call(body) if complete else None
        if call is None:
            self._keep("".join(held), "text")
            return
        self.tool_calls.append(call)
        self._out += [piece for piece in held if piece.part == "tags"]
        self._keep(written, "tool_call")
