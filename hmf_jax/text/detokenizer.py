"""Tokens become text piece by piece, and stop strings end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns the tokens of one row into text, piece by piece.

    A character whose bytes are spread over several tokens appears once it is complete, and text
    that may be the beginning of a stop string is held back until that is decided. The pieces do
    not depend on how the tokens were grouped, and together they are `text`.

    Args:
      tokenizer: a Hugging Face tokenizer.
      stop: generation ends before the first of these strings to be completed.
      end_ids: tokens that have no text.

    Attributes:
      text: all pieces so far.
      tokens, logprobs: all that was pushed, up to the token that completed a stop string.
      stopped: whether a stop string was completed.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), end_ids: Sequence[int] = ()):
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.stopped = False
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self._stop = check_stop(stop)
        self._window: list[int] = []  # newest tokens; decoding needs some context before them
        self._context = 0  # how many of them are context
        self._sent = 0  # characters of the decoded window already passed on
        self._held = ""  # passed on, but perhaps the beginning of a stop string

    def push(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Add tokens; the text that is certain now. What follows a stop string is ignored."""
        out = ""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.stopped:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token not in self._end_ids:
                out += self._scan(self._detokenize(token))
        self.text += out
        return out

    def finish(self) -> str:
        """The rest of the text, once no more tokens will come."""
        if self.stopped:
            return ""
        rest = self._scan(self._decode(self._window)[self._sent :]) + self._held
        self._window, self._held = [], ""
        self._context = self._sent = 0
        self.text += rest
        return rest

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _detokenize(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        # An unfinished character decodes to one replacement character at the end.
        certain = text.removesuffix("\ufffd")
        new = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if certain == text:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._sent = len(self._decode(self._window))
        return new

    def _scan(self, piece: str) -> str:
        self._held += piece
        found = [(i + len(s), i) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            _, start = min(found)
            out, self._held, self.stopped = self._held[:start], "", True
            return out
        longest = max((len(s) - 1 for s in self._stop), default=0)
        keep = next(
            n
            for n in range(min(longest, len(self._held)), -1, -1)
            if n == 0 or any(s.startswith(self._held[-n:]) for s in self._stop)
        )
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; ValueError if one is empty."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop={stop!r}: stop strings must be non-empty strings.")
    return stops
