"""The rows on the device, each with a contiguous buffer of `capacity` tokens; turns run on them.

This is all that knows how the memory of requests is laid out. The engine uses `enqueue`, which only
hands work to the device, and `collect`, which waits for what it produced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.engine import programs
from hmf_jax.engine.programs import MOST_STEPS, Layout, Rows, Settings, stack_settings
from hmf_jax.engine.request import GREEDY, Request
from hmf_jax.engine.scheduler import Feed, Result, Turn
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.state import ModelState

SMALLEST_CHUNK = 64  # tokens; the last chunk of a prompt is padded to this times a power of two
SMALLEST_CAPACITY = 256  # tokens
_NOBODY = Request((), 1, GREEDY)


class Ticket(NamedTuple):
    """What a turn will have produced: tokens and logprobs [n, ...], reasons [n] of these rows."""

    rows: Sequence[int]
    tokens: jax.Array
    logprobs: jax.Array
    reasons: jax.Array


class Buffers:
    """Rows of one batch.

    Args:
      model: the model.
      size: number of rows.
      capacity: most tokens a row may hold, prompts and generated tokens together.
      prefill_chunk: prompts are fed in pieces of this many tokens.
      state: what the rows hold at first (a copy is made), instead of nothing.
    """

    def __init__(
        self,
        model: HybridLM,
        size: int,
        *,
        capacity: int,
        prefill_chunk: int,
        state: ModelState | None = None,
    ) -> None:
        self.size, self.capacity, self.chunk = size, capacity, prefill_chunk
        self._own = None if model.config.gka is None else model.config.gka.num_iter
        self._packed = PackedModel.of(model)
        self._layout = Layout.of(self._packed, size, capacity)
        room = capacity if state is None else 1  # of a state that is not used
        layout = self._layout if state is None else Layout.of(self._packed, size, room)
        self._rows, self._logits = programs.empty.on(layout)(self._packed, size, room)
        self._used = np.zeros(size, bool)
        if state is not None:
            copy = jax.tree.map(jnp.copy, state)
            if self._layout is not None:
                copy = jax.device_put(copy, self._layout.rows(copy.fresh).state)
            self._rows = dataclasses.replace(self._rows, state=copy)
            self._used[:] = True
        self._asked: list[Request] = [_NOBODY] * size
        self._settings = self._stack(self._asked)

    def enqueue(self, turn: Turn, asked: Mapping[int, Request]) -> Ticket:
        """Hands a turn to the device; `asked` are the requests by id."""
        if turn.feed is None:
            return self._decode(turn.ends, turn.steps)
        for id, row in zip(turn.feed.ids, turn.feed.rows, strict=True):
            self._asked[row] = asked[id]
        self._settings = self._stack(self._asked)
        return self._alone(turn.feed) if turn.feed.alone else self._together(turn.feed)

    def collect(self, ticket: Ticket) -> Result:
        """Waits for what a turn has produced."""
        new, scores, ended = jax.device_get((ticket.tokens, ticket.logprobs, ticket.reasons))
        tokens: list[list[int]] = [[] for _ in range(self.size)]
        logprobs: list[list[float]] = [[] for _ in range(self.size)]
        reasons = [programs.RUNNING] * self.size
        for row, line, score, reason in zip(ticket.rows, new, scores, ended, strict=True):
            count = int((line >= 0).sum())
            tokens[row], logprobs[row] = line[:count].tolist(), score[:count].tolist()
            reasons[row] = int(reason)
        return Result(tokens, logprobs, reasons)

    def _decode(self, ends: Sequence[int], steps: int) -> Ticket:
        ending = np.zeros(self.size, bool)
        ending[list(ends)] = True
        self._rows, *out = programs.decode.on(self._layout)(
            self._packed, self._rows, ending, np.int32(min(steps, MOST_STEPS)), self._settings
        )
        return Ticket(range(self.size), *out)

    def _together(self, feed: Feed) -> Ticket:
        """Feeds all prompts in one program, in place."""
        stale = np.zeros(self.size, bool)
        for row, continued in zip(feed.rows, feed.continued, strict=True):
            stale[row] = self._used[row] and not continued
        if stale.any():
            self._rows = programs.clear.on(self._layout)(self._rows, stale)
        self._used[list(feed.rows)] = True
        prompts: list[Sequence[int]] = [()] * self.size
        for row in feed.rows:
            prompts[row] = self._asked[row].prompt
        self._rows, self._logits = self._prefill(
            self._layout, self._rows, self._logits, prompts, self._settings
        )
        starts = np.zeros(self.size, bool)
        starts[list(feed.rows)] = True
        left = np.array([request.max_new_tokens for request in self._asked], np.int32)
        self._rows, *out = programs.first.on(self._layout)(
            self._rows, self._logits, starts, left, self._settings
        )
        return Ticket(range(self.size), *out)

    def _alone(self, feed: Feed) -> Ticket:
        """Feeds one prompt to a row of its own, which then takes its place."""
        (row,), (goes_on,) = feed.rows, feed.continued
        request, layout = self._asked[row], Layout.of(self._packed, 1, self.capacity)
        one, logits = programs.empty.on(layout)(self._packed, 1, self.capacity)
        if goes_on:
            one = programs.take.on(layout)(programs.begun(self._rows), np.int32(row))
        settings = self._stack([request])
        one, logits = self._prefill(layout, one, logits, [request.prompt], settings)
        left = np.array([request.max_new_tokens], np.int32)
        one, *out = programs.first.on(layout)(one, logits, np.ones(1, bool), left, settings)
        self._rows = programs.insert.on(self._layout)(
            programs.begun(self._rows), one, np.int32(row)
        )
        self._used[row] = True
        return Ticket(feed.rows, *out)

    def _prefill(
        self,
        layout: Layout | None,
        rows: Rows,
        logits: jax.Array,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
    ) -> tuple[Rows, jax.Array]:
        """Feeds prompts, one per row, in pieces."""
        longest = max(map(len, prompts))
        for start in range(0, longest, self.chunk):
            width = min(power_of_two(longest - start, SMALLEST_CHUNK), self.chunk)
            tokens = np.zeros((len(prompts), width), np.int32)
            lengths = np.zeros(len(prompts), np.int32)
            for row, prompt in enumerate(prompts):
                piece = prompt[start : start + self.chunk]
                tokens[row, : len(piece)], lengths[row] = piece, len(piece)
            rows, logits = programs.prefill.on(layout)(
                self._packed, rows, logits, tokens, lengths, settings.num_iter
            )
        return rows, logits

    def _stack(self, asked: Sequence[Request]) -> Settings:
        return stack_settings(
            self._own,
            [request.sampling for request in asked],
            [request.eos_ids for request in asked],
            [request.num_iter for request in asked],
        )


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n, or `least` if that is larger."""
    return max(least, 1 << max(n - 1, 0).bit_length())
