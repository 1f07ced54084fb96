"""A reply as OpenAI's interface streams it: reasoning, content, and calls of tools."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence

from hmf_jax.text.detokenizer import Place
from hmf_jax.text.parts import CALL, END_THINK, THINK, Cutter


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks."""

    text: str


@dataclasses.dataclass(frozen=True)
class Content:
    """More of what the model says."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallStart:
    """The model calls a tool, the `index`-th of the reply (from 0)."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of the arguments of a call, as the model wrote it."""

    index: int
    text: str


Delta = Reasoning | Content | CallStart | CallArguments


class ReplyDeltas(Cutter[Delta]):
    """Cuts a reply into what is streamed of it; arguments: `Cutter`.

    The deltas together are the attributes, whatever the text was grouped like. A call is streamed
    from the moment on that its arguments begin, and stays a call then, whatever the arguments turn
    out to be; one that is malformed before is content. If the reply ends within a call, what there
    is of its arguments is kept.

    Attributes:
      thinking: None if the model did not think.
      text: without calls of tools. Tokens of thinking tags that open or close nothing are left out.
      tool_calls: [{"id": "call_...", "type": "function", "function": {"name": str, "arguments":
        str}}, ...]
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        *,
        opened: bool = False,
        thinking: bool = True,
        tools: bool = False,
    ):
        super().__init__(tokens, opened=opened, thinking=thinking, tools=tools)
        left_out = (THINK, END_THINK) if thinking else ()
        self._left_out = {tokens[tag] for tag in left_out if tag in tokens}

    def reasoning_tokens(self, tokens: Sequence[int]) -> int:
        """How many of the tokens of the reply so far are thinking, tags included.

        0 where the end of thinking is no token of the tokenizer.
        """
        end = self._tokens.get(END_THINK)
        if self.thinking is None or end is None:
            return 0
        if end in tokens:
            return tokens.index(end) + 1
        call = self._tokens.get(CALL)
        return tokens.index(call) if self.tool_calls and call in tokens else len(tokens)

    def _think(self, length: int) -> int:
        end = self._at + length
        for place in self._left_out_before(end):
            self._emit(super()._think(max(place.start - self._at, 0)), "thinking")
            self._emit(min(place.end, end) - self._at, "tags")
        return super()._think(end - self._at)

    def _emit(self, length: int, part: str) -> None:
        end = self._at + length
        for place in self._left_out_before(end) if part == "text" else ():
            super()._emit(max(place.start - self._at, 0), part)
            super()._emit(min(place.end, end) - self._at, "tags")
        super()._emit(end - self._at, part)

    def _left_out_before(self, end: int) -> list[Place]:
        """The tags that are left out and have text between here and there."""
        return [
            place
            for place in self._places
            if place.token in self._left_out and place.start < end and place.end > self._at
        ]

    def _keep(self, text: str, part: str) -> None:
        super()._keep(text, part)
        if part == "thinking":
            self._add(Reasoning(text))
        elif part == "text":
            self._add(Content(text))

    def _begin_call(self, name: str) -> None:
        index, id = len(self.tool_calls), f"call_{secrets.token_hex(12)}"
        function = {"name": name, "arguments": ""}
        self.tool_calls.append({"id": id, "type": "function", "function": function})
        self._out.append(CallStart(index, id, name))

    def _add_arguments(self, text: str) -> None:
        self.tool_calls[-1]["function"]["arguments"] += text
        self._add(CallArguments(len(self.tool_calls) - 1, text))

    def _add(self, delta: Reasoning | Content | CallArguments) -> None:
        """Joins it to the one before, if that is of the same kind."""
        before = self._out[-1] if self._out else None
        if before is None or isinstance(before, CallStart) or type(before) is not type(delta):
            self._out.append(delta)
        else:
            self._out[-1] = dataclasses.replace(before, text=before.text + delta.text)
