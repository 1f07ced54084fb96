"""What came back: the answer, when its parts came, and what of it breaks the protocol."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from hmf_jax.serving.load.call import CHAT, COMPLETIONS, Call

_OBJECTS = {
    CHAT: ("chat.completion", "chat.completion.chunk"),
    COMPLETIONS: ("text_completion",) * 2,
}
_REASONS = {"stop", "length", "tool_calls"}


@dataclasses.dataclass
class Choice:
    """One choice; of a stream the deltas joined.

    Attributes:
      text: `content` or `text`.
      token_ids: as told with "return_token_ids".
      logprobs: of each token, where asked for; `tokens` are their texts.
      ends: how often a finish_reason came.
    """

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    tokens: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[float | None] = dataclasses.field(default_factory=list)
    tool_calls: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)
    finish_reason: str | None = None
    stop_reason: Any = None
    seed: int | None = None
    ends: int = 0


@dataclasses.dataclass
class Reply:
    """The reply to a call. Times are seconds of one clock.

    Attributes:
      sent: when the call was made.
      begun: when the status line came.
      times: when each event of a stream with tokens came; `counts`: tokens in it.
      ended: when it was over.
      status: 0: none came.
      choices: by index.
      error: the error object, of the body or of an event.
      refused: how often the server had no room before.
      left: the client closed the connection on purpose.
      failure: why there is no complete answer, although the client waited.
      problems: what breaks the protocol.
    """

    call: Call
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sent: float = 0.0
    begun: float | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    choices: dict[int, Choice] = dataclasses.field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    body: bytes = b""
    id: str | None = None
    done: bool = False
    refused: int = 0
    left: bool = False
    failure: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """A complete answer came."""
        return self.status == 200 and not (self.error or self.failure or self.left)

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def output_tokens(self) -> int:
        return (self.usage or {}).get("completion_tokens") or sum(self.counts)

    @property
    def prompt_tokens(self) -> int:
        return (self.usage or {}).get("prompt_tokens") or 0

    @property
    def cached_tokens(self) -> int:
        return ((self.usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def problem(self, text: str) -> None:
        """Notes what breaks the protocol; a few are enough."""
        if len(self.problems) < 5:
            self.problems.append(text)

    # What comes in.

    def event(self, block: bytes, now: float) -> bool:
        """Takes one event of a stream; whether it says why a choice ended."""
        if all(line.startswith(b":") for line in block.split(b"\n")):
            return False  # a comment, which keeps the connection alive
        if not block.startswith(b"data: ") or b"\n" in block:
            self.problem(f"not an event of one data line: {block[:80]!r}")
            return False
        if self.done or self.error:
            self.problem(f"an event after the end: {block[:80]!r}")
        data = block[len(b"data: ") :]
        if data == b"[DONE]":
            self.done = True
            return False
        chunk = self._json(data)
        if chunk is None:
            return False
        if "error" in chunk:
            self.error = self._error(chunk)
            return False
        self._same(chunk, 1)
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        before = sum(self.counts)
        ended, tokens = False, 0
        for part in chunk.get("choices", ()):
            tokens += self._delta(part)
            ended |= part.get("finish_reason") is not None
        if not tokens and chunk.get("choices"):
            told = (chunk.get("usage") or {}).get("completion_tokens")
            tokens = max(0, told - before) if told is not None else self._says(chunk)
        if tokens:
            self.times.append(now)
            self.counts.append(tokens)
        return ended

    def _says(self, chunk: dict[str, Any]) -> int:
        """1 if there is text in it and nothing tells how many tokens that is."""
        parts = (c.get("delta", c) for c in chunk["choices"])
        keys = ("content", "text", "reasoning", "reasoning_content", "tool_calls")
        return int(any(part.get(key) for part in parts for key in keys))

    def whole(self) -> None:
        """Takes the body of an answer that is no stream."""
        answer = self._json(self.body) if self.body else None
        if self.status >= 400:
            self.error = self._error(answer or {})
            if self.status in (429, 503) and "retry-after" not in self.headers:
                self.problem(f"{self.status} without Retry-After")
            return
        if answer is None or self.call.path not in _OBJECTS:
            return
        self._same(answer, 0)
        self.usage = answer.get("usage")
        for part in answer.get("choices", ()):
            self._delta({**part, "delta": part.get("message", {})})
        self.done = True

    def finish(self) -> None:
        """Checks what holds of a whole reply."""
        right = {*(self.call.expect or (200,))}
        if self.call.path in _OBJECTS:  # there may be no room
            right |= {429, 503}
        if self.failure:
            self.problem(self.failure)
        elif self.status and self.status not in right:
            self.problem(f"status {self.status} instead of {sorted(right)}: {self.error or ''}")
        if self.call.seconds and self.begun and self.begun - self.sent > self.call.seconds:
            self.problem(f"took {self.begun - self.sent:.3f} s, not {self.call.seconds} s")
        if self.ok and self.call.path in _OBJECTS:
            self._complete()

    # What is checked.

    def _json(self, data: bytes) -> dict[str, Any] | None:
        try:
            value = json.loads(data, parse_constant=_refuse)
        except ValueError as e:
            self.problem(f"not JSON ({e}): {data[:80]!r}")
            return None
        if not isinstance(value, dict):
            self.problem(f"not a JSON object: {data[:80]!r}")
            return None
        return value

    def _error(self, answer: dict[str, Any]) -> dict[str, Any]:
        error: Any = answer.get("error")
        if not isinstance(error, dict):
            error = {}
        whole = {"message", "type", "param", "code"} <= set(error)
        if not whole or not isinstance(error["message"], str) or not error["message"]:
            self.problem(f"status {self.status} without the shape of an error: {answer}")
        return {"message": "", **error}

    def _same(self, chunk: dict[str, Any], stream: int) -> None:
        if chunk.get("object") != _OBJECTS.get(self.call.path, ("", ""))[stream]:
            self.problem(f"object {chunk.get('object')!r}")
        if self.id is None:
            self.id = chunk.get("id")
        if not self.id or chunk.get("id") != self.id:
            self.problem(f"id {chunk.get('id')!r} after {self.id!r}")

    def _delta(self, part: dict[str, Any]) -> int:
        """Adds a part of a choice; how many tokens it says it has."""
        choice = self.choices.setdefault(part.get("index", -1), Choice())
        if choice.ends:
            self.problem(f"choice {part.get('index')} goes on after its end")
        delta = part.get("delta") or part
        choice.text += delta.get("content") or delta.get("text") or ""
        choice.reasoning += delta.get("reasoning") or delta.get("reasoning_content") or ""
        for place, piece in enumerate(delta.get("tool_calls") or ()):
            call = choice.tool_calls.setdefault(piece.get("index", place), {"arguments": ""})
            call |= {key: piece[key] for key in ("id", "type") if piece.get(key)}
            function = piece.get("function") or {}
            call |= {"name": function["name"]} if function.get("name") else {}
            call["arguments"] += function.get("arguments") or ""
        ids = part.get("token_ids") or []
        choice.token_ids += ids
        told = part.get("logprobs") or {}
        if told.get("content") is not None:
            new = [(item["token"], item["logprob"]) for item in told["content"]]
        else:
            new = list(zip(told.get("tokens", ()), told.get("token_logprobs", ()), strict=True))
        choice.tokens += [token for token, _ in new]
        choice.logprobs += [value for _, value in new]
        if ids and new and len(ids) != len(new):
            self.problem(f"{len(ids)} token_ids with {len(new)} logprobs in one part")
        if part.get("finish_reason") is not None:
            choice.ends += 1
            choice.finish_reason, choice.stop_reason = (
                part["finish_reason"],
                part.get("stop_reason"),
            )
            choice.seed = part.get("seed")
            if choice.finish_reason not in _REASONS:
                self.problem(f"finish_reason {choice.finish_reason!r}")
        return len(ids)

    def _complete(self) -> None:
        prompts = self.asked.get("prompt")
        count = self.asked.get("n") or 1
        if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
            count *= len(prompts)
        if sorted(self.choices) != list(range(count)):
            self.problem(f"choices {sorted(self.choices)}, not 0 to {count - 1}")
        for index, choice in self.choices.items():
            if choice.ends != 1:
                self.problem(f"choice {index} has {choice.ends} ends")
        if self.streamed and not self.done:
            self.problem("the stream ended without [DONE]")
        options = self.asked.get("stream_options") or {}
        if not self.streamed or options.get("include_usage"):
            self._usage()

    def _usage(self) -> None:
        usage = self.usage or {}
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if prompt is None or output is None or usage.get("total_tokens") != prompt + output:
            self.problem(f"usage {self.usage}")
        elif self.cached_tokens > prompt:
            self.problem(f"cached_tokens {self.cached_tokens} of {prompt}")
        elif self.asked.get("return_token_ids") and not self.asked.get("echo"):
            told = sum(len(choice.token_ids) for choice in self.choices.values())
            if told != output:
                self.problem(f"completion_tokens {output}, but {told} token_ids")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
