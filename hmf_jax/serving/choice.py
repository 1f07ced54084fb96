"""One choice of an answer while it is written: tokens become text, and text becomes its parts."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from hmf_jax.engine import Finished, New, Scored
from hmf_jax.serving.asks import Ask, alternatives
from hmf_jax.serving.protocol import Chat, Completion
from hmf_jax.serving.served import Served
from hmf_jax.text import TextStream
from hmf_jax.text.deltas import Delta, ReplyDeltas
from hmf_jax.text.parts import TAGS
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
      text: so far; of a chat, what is neither reasoning nor a call of a tool.
      tokens: of what was taken.
      prompt_tokens: of the prompt, if it is scored or repeated.
      finish_reason, stop_reason: see `Piece`.
    """

    def __init__(self, ask: Ask, index: int, served: Served) -> None:
        self.ask, self.index, self._served = ask, index, served
        self.request, fields = ask.requests[index], ask.fields
        self.done, self.count, self.text = False, 0, ""
        self.tokens, self.prompt_tokens = list[Token](), list[Token]()
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.started = False
        ends = set() if fields.ignore_eos else set(served.ends)
        self._stops = set(fields.stop_token_ids)
        self._late = (ends | self._stops) - set(self.request.eos_ids)  # the device does not know
        tags = tag_ids(served.tokenizer, TAGS) if ask.chat else {}
        choice = fields.tool_choice if isinstance(fields, Chat) else None
        has_to_call = choice not in (None, "none", "auto")  # stop strings are not for arguments
        self._stream = TextStream(
            served.tokenizer,
            () if has_to_call else fields.stop,
            [*(ends if fields.include_stop_str_in_output else ends | self._stops)],
            {token: tag for tag, token in tags.items()},
            special=not fields.skip_special_tokens,
            keep_stop=fields.include_stop_str_in_output,
        )
        self._parts: ReplyDeltas | None = None
        if isinstance(fields, Chat):
            tools = bool(fields.tools) and choice != "none"
            self._parts = ReplyDeltas(tags, opened=ask.prompt(index).thinking, tools=tools)
        self._echo = isinstance(fields, Completion) and fields.echo
        self._scores: list[tuple[float | None, dict[int, float]]] = [(None, {})]
        self._waiting: list[tuple[Token, int | None]] = []  # and where their texts end
        self._pending, self._written = "", 0  # text that is not told yet; characters that are
        self._before = 0  # characters of the prompt that is repeated
        self._new = Piece(index)

    @property
    def reasoning(self) -> str | None:
        """What the model thinks, so far; None: nothing."""
        return self._parts.thinking or None if self._parts else None

    @property
    def thought(self) -> int:
        """How many of the tokens are reasoning."""
        return self._parts.reasoning_tokens(self._stream.tokens) if self._parts else 0

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Calls of tools, as answers have them."""
        return self._parts.tool_calls if self._parts else []

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
        self._pending += self._stream.push([token], [logprob])
        if start is None:
            start = self._waiting[-1][0].offset - self._before
        top = {**top, token: logprob} if alternatives(self.ask.fields) else {token: logprob}
        told = Token(token, self._before + start, logprob, top)
        self._waiting.append((told, self._stream.decoded))
        self._release()
        if self._stream.stopped:
            self._finish("stop", self._stream.stop)
        elif token in self._late and self.count > self.request.min_new_tokens:
            self._finish("stop", token if token in self._stops else None)

    def _end(self, event: Finished) -> None:
        """The engine has ended it, in one of the ways that are no fault."""
        self._begin()
        last = self._stream.tokens[-1] if self._stream.tokens else None
        if event.reason in ("eos", "stop"):
            self._finish("stop", last if last in self._stops else None)
        else:
            self._finish("length", None)

    def _finish(self, reason: str, stop: int | str | None) -> None:
        self._pending += self._stream.finish()
        self._release(everything=True)
        if self.calls and reason == "stop":
            reason = "tool_calls"
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

    def _release(self, everything: bool = False) -> None:
        """Tokens whose text is certain are told, and their text; what is left of a token waits."""
        certain, count, end = len(self._stream.text), 0, 0
        for i, (_, place) in enumerate(self._waiting, 1):
            if place is not None and place <= certain:
                count, end = i, place
        cut = max(end - self._written, 0)
        if everything:
            count, cut = len(self._waiting), len(self._pending)
        out = [token for token, _ in self._waiting[:count]]
        text, self._pending = self._pending[:cut], self._pending[cut:]
        self._waiting = self._waiting[count:]
        self._written += cut
        self.tokens += out
        self._new.tokens += out
        if self._parts is None:
            self.text += text
            self._new.text += text
            return
        self._new.deltas += self._parts.push(text, self._stream.places)
        if everything:
            self._new.deltas += self._parts.finish()
        self.text = self._parts.text
