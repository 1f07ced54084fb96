"""One choice of an answer while it is written: tokens become text, and text becomes its parts."""

from __future__ import annotations

import dataclasses
import uuid
from typing import NamedTuple

from hmf_jax.engine import Finished, New, Scored
from hmf_jax.serving.asks import Ask, Served, alternatives
from hmf_jax.serving.protocol import Chat, Completion
from hmf_jax.text import TextStream
from hmf_jax.text.parts import TAGS, ReplyParts
from hmf_jax.text.tokenizer import tag_ids


class Token(NamedTuple):
    """A token of an answer, or of a prompt that is repeated in it.

    Attributes:
      id: of the token.
      offset: where its text begins in the text of the choice, in characters.
      logprob: None for the first token of a prompt.
      top: the most likely tokens at this place, this one included, {token: log-probability}.
    """

    id: int
    offset: int
    logprob: float | None
    top: dict[int, float]


class Reasoning(NamedTuple):
    """More of what the model thinks."""

    text: str


class Content(NamedTuple):
    """More of the answer itself."""

    text: str


class CallStart(NamedTuple):
    """A call of a tool begins."""

    index: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """More of the arguments of a call, as JSON text."""

    index: int
    text: str


Delta = Reasoning | Content | CallStart | CallArguments


class _Deltas:
    """A reply in deltas, from its parts."""

    def __init__(self, tokens: dict[str, int], *, opened: bool, tools: bool) -> None:
        self._parts = ReplyParts(tokens, opened=opened, tools=tools)
        self._calls = 0

    def push(self, text: str, places: list) -> list[Delta]:
        return self._told(self._parts.push(text, places))

    def finish(self) -> list[Delta]:
        return self._told(self._parts.finish())

    def _told(self, pieces: list) -> list[Delta]:
        import json

        out: list[Delta] = []
        for piece in pieces:
            if piece.part == "thinking":
                out.append(Reasoning(str(piece)))
            elif piece.part == "text":
                out.append(Content(str(piece)))
        for i, call in enumerate(self._parts.tool_calls[self._calls :], self._calls):
            function = call["function"]
            out.append(CallStart(i, f"call_{uuid.uuid4().hex[:24]}", function["name"]))
            out.append(CallArguments(i, json.dumps(function["arguments"], ensure_ascii=False)))
        self._calls = len(self._parts.tool_calls)
        return out


@dataclasses.dataclass
class Call:
    """A call of a tool."""

    id: str
    name: str
    arguments: str = ""


@dataclasses.dataclass
class Piece:
    """What is new of a choice.

    Attributes:
      index: of the choice.
      text: of a completion.
      deltas: of a chat.
      tokens: that the text is of; what is held back of the text delays its tokens, too.
      finish_reason: "stop", "length" or "tool_calls" in the last piece.
      stop_reason: the stop string or the token that has ended it.
    """

    index: int
    text: str = ""
    deltas: list[Delta] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Choice:
    """One choice of an answer.

    Attributes:
      index: its place in the answer.
      ask: what it belongs to.
      done: nothing more comes.
      count: tokens that were generated, the end token included.
      thought: how many of them are reasoning.
      text, reasoning, calls: the answer so far, without the prompt that it may repeat; of a
        completion only the text.
      tokens: of what was taken.
      prompt_tokens: of the prompt, if it is scored or repeated.
      finish_reason, stop_reason: see `Piece`.
    """

    def __init__(self, ask: Ask, index: int, served: Served) -> None:
        self.ask, self.index, self._served = ask, index, served
        self.request, fields = ask.requests[index], ask.fields
        self.done, self.count, self.thought = False, 0, 0
        self.text, self.reasoning, self.calls = "", "", list[Call]()
        self.tokens, self.prompt_tokens = list[Token](), list[Token]()
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.started = False
        ends = set() if fields.ignore_eos else set(served.ends)
        self._stops = set(fields.stop_token_ids)
        self._late = (ends | self._stops) - set(self.request.eos_ids)  # the device does not know
        tags = tag_ids(served.tokenizer, TAGS) if ask.chat else {}
        self._stream = TextStream(
            served.tokenizer,
            fields.stop,
            [*(ends if fields.include_stop_str_in_output else ends | self._stops)],
            {token: tag for tag, token in tags.items()},
            special=not fields.skip_special_tokens,
            keep_stop=fields.include_stop_str_in_output,
        )
        self._parts: _Deltas | None = None
        if isinstance(fields, Chat):
            tools = bool(fields.tools) and fields.tool_choice != "none"
            self._parts = _Deltas(tags, opened=ask.prompt(index).thinking, tools=tools)
        self._echo = isinstance(fields, Completion) and fields.echo
        self._scores: list[tuple[float | None, dict[int, float]]] = [(None, {})]
        self._waiting: list[tuple[Token, int | None]] = []  # and where their texts end
        self._before = 0  # characters of the prompt that is repeated
        self._new = Piece(index)

    def push(self, event: Scored | New | Finished) -> None:
        """What the engine tells of it."""
        if isinstance(event, Scored):
            tops = event.top or [{}] * len(event.logprobs)
            self._scores += zip(event.logprobs, tops, strict=True)
        elif isinstance(event, New):
            tops = event.top or [{}] * len(event.tokens)
            for token, logprob, top in zip(event.tokens, event.logprobs, tops, strict=True):
                if not self.done:
                    self._add(token, logprob, top)
        elif not self.done:
            self._end(event)

    def take(self) -> Piece | None:
        """What is new since the last time; None if nothing is."""
        new = self._new
        if not (new.text or new.deltas or new.tokens or new.finish_reason):
            return None
        self._new = Piece(self.index)
        return new

    def _add(self, token: int, logprob: float, top: dict[int, float]) -> None:
        self._begin()
        self.count += 1
        start = self._stream.decoded
        text = self._stream.push([token], [logprob])
        if start is None:
            start = self._waiting[-1][0].offset - self._before
        places = self._stream.places
        top = {**top, token: logprob} if alternatives(self.ask.fields) else {token: logprob}
        told = Token(token, self._before + start, logprob, top)
        self._waiting.append((told, self._stream.decoded))
        self._write(text, self._parts.push(text, places) if self._parts else [])
        if self._stream.stopped:
            self._finish("stop", self._stream.stop)
        elif token in self._late and self.count > self.request.min_new_tokens:
            self._flush()
            self._finish("stop", token if token in self._stops else None)

    def _end(self, event: Finished) -> None:
        """The engine has ended it, in one of the ways that are no fault."""
        self._begin()
        self._flush()
        last = self._stream.tokens[-1] if self._stream.tokens else None
        if event.reason in ("eos", "stop"):
            self._finish("stop", last if last in self._stops else None)
        else:
            self._finish("length", None)

    def _flush(self) -> None:
        rest = self._stream.finish()
        places = self._stream.places
        self._write(rest, self._parts.push(rest, places) if self._parts else [])

    def _finish(self, reason: str, stop: int | str | None) -> None:
        if self._parts is not None:
            self._write("", self._parts.finish())
        if self.calls and reason == "stop":
            reason = "tool_calls"
        self._release(everything=True)
        self.finish_reason, self.stop_reason, self.done = reason, stop, True
        self._new.finish_reason, self._new.stop_reason = reason, stop

    def _begin(self) -> None:
        """Before anything of its own: the prompt, if it is repeated or scored."""
        if self.started:
            return
        self.started = True
        if not self._echo and self.request.prompt_logprobs is None:
            return
        prompt, fields = self.ask.prompt(self.index), self.ask.fields
        # In a text that the client sent, special tokens are text, too.
        special = prompt.text is not None or not fields.skip_special_tokens
        stream = TextStream(self._served.tokenizer, special=special)
        offset = 0
        scores = [*self._scores, *[(None, {})] * len(prompt.tokens)]
        for token, (logprob, top) in zip(prompt.tokens, scores, strict=False):
            own = {} if logprob is None else {**top, token: logprob}
            self.prompt_tokens.append(Token(token, offset, logprob, own))
            stream.push([token], [0.0])
            offset = offset if stream.decoded is None else stream.decoded
        stream.finish()
        if self._echo:
            self.text = stream.text if prompt.text is None else prompt.text
            self._before = len(self.text)
            self._new.text, self._new.tokens = self.text, list(self.prompt_tokens)
            self.tokens += self.prompt_tokens

    def _write(self, text: str, deltas: list[Delta]) -> None:
        if self._parts is None:
            self.text += text
            self._new.text += text
        for delta in deltas:
            if isinstance(delta, Reasoning):
                self.reasoning += delta.text
            elif isinstance(delta, Content):
                self.text += delta.text
            elif isinstance(delta, CallStart):
                self.calls.append(Call(delta.id, delta.name))
            else:
                self.calls[delta.index].arguments += delta.text
        self._new.deltas += deltas
        if self.reasoning and not self.text and not self.calls:
            self.thought = self.count
        self._release()

    def _release(self, everything: bool = False) -> None:
        """Tokens whose text is out are told with it."""
        written = len(self._stream.text)
        count = len(self._waiting)
        if not everything:
            whole = [i for i, (_, end) in enumerate(self._waiting) if end is not None]
            count = 1 + max((i for i in whole if self._waiting[i][1] <= written), default=-1)
        out = [token for token, _ in self._waiting[:count]]
        del self._waiting[:count]
        self.tokens += out
        self._new.tokens += out
