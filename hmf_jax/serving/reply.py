"""An answer while the engine works on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from hmf_jax.engine import Finished, New, Scored, Started
from hmf_jax.serving.asks import Ask
from hmf_jax.serving.choice import Choice, Piece
from hmf_jax.serving.errors import ApiError


class Reply:
    """An answer while the engine works on it.

    Attributes:
      ask: what was asked.
      choices: in the order of their index.
      cached: tokens of the prompts that did not have to be read.
    """

    def __init__(self, ask: Ask, choices: list[Choice], cancel: Callable[[Choice], None]) -> None:
        self.ask, self.choices = ask, choices
        self.cached: dict[int, int] = {}  # by prompt
        self._cancel = cancel
        self._changed = asyncio.Event()
        self._error: ApiError | None = None

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is new, of all choices, whenever something is.

        Raises:
          ApiError: the request has failed.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            new = [piece for choice in self.choices if (piece := choice.take()) is not None]
            ended = all(choice.done for choice in self.choices)  # and not what comes meanwhile
            if new:
                yield new
            if ended:
                return

    async def whole(self) -> None:
        """Waits until every choice has ended; ApiError if the request has failed."""
        async for _ in self.pieces():
            pass

    def push(self, choice: Choice, event: Started | Scored | New | Finished) -> None:
        """What the engine tells of a choice."""
        if isinstance(event, Started):
            self.cached.setdefault(choice.index // self.ask.fields.n, event.cached)
            return
        choice.push(event)
        if choice.done and not isinstance(event, Finished):
            self._cancel(choice)
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """It ends with this error."""
        if self._error is None and not all(choice.done for choice in self.choices):
            self._error = error
            self._changed.set()
            self.close()

    def close(self) -> None:
        """Nobody waits for it any more: whatever still runs of it ends."""
        for choice in self.choices:
            if not choice.done:
                choice.done = True
                self._cancel(choice)

    @property
    def started(self) -> bool:
        """Whether the engine has begun with any of it."""
        return bool(self.cached)

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens it is, so far."""
        prompt = sum(len(prompt.tokens) for prompt in self.ask.prompts)
        made = sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.thought for choice in self.choices)
            },
        }
