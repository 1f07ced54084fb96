"""The rows on the device, each with a contiguous buffer of `capacity` tokens; turns run on them.

This is all that knows how the memory of requests is laid out. The engine uses `enqueue`, which only
hands work to the device, and `collect`, which waits for what it produced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.engine import programs
from hmf_jax.engine.old_scheduler import Feed, Result, Turn
from hmf_jax.engine.programs import (
    MOST_STEPS,
    SMALLEST_CHUNK,
    Layout,
    Rows,
    Top,
    as_dicts,
    power_of_two,
)
from hmf_jax.engine.programs import SMALLEST_CAPACITY as SMALLEST_CAPACITY
from hmf_jax.engine.request import GREEDY, Request
from hmf_jax.engine.settings import Processor, Settings, stack_settings
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.state import ModelState

_NOBODY = Request((), 1, GREEDY)


class Ticket(NamedTuple):
    """What a turn will have produced: tokens and logprobs [n, ...], reasons [n] of these rows, and
    the most likely tokens, if anybody asked for them."""

    rows: Sequence[int]
    tokens: jax.Array
    logprobs: jax.Array
    reasons: jax.Array
    top: Top | None


class Buffers:
    """Rows of one batch.

    Args:
      model: the model.
      size: number of rows.
      capacity: most tokens a row may hold, prompts and generated tokens together.
      prefill_chunk: prompts are fed in pieces of this many tokens.
      state: what the rows hold at first (a copy is made), instead of nothing.
      processor: changes the logits of all rows, see `hmf_jax.engine.settings`.
      solver: of GKA layers.
    """

    def __init__(
        self,
        model: HybridLM,
        size: int,
        *,
        capacity: int,
        prefill_chunk: int,
        state: ModelState | None = None,
        processor: Processor | None = None,
        solver: str = "chebyshev",
    ) -> None:
        self.size, self.capacity, self.chunk = size, capacity, prefill_chunk
        self._own = None if model.config.gka is None else model.config.gka.num_iter
        self._packed = PackedModel.of(model)
        self._layout = Layout.of(self._packed, size, capacity)
        room = capacity if state is None else 1  # of a state that is not used
        layout = self._layout if state is None else Layout.of(self._packed, size, room)
        self._rows, self._logits = programs.empty.on(layout)(self._packed, size, room)
        self._used = np.zeros(size, bool)
        self._appends = tuple(KINDS[symbol].appends for symbol in model.config.student_kinds)
        self._marks: list[dict[int, Rows]] = [{} for _ in range(size)]  # by number of tokens
        if state is not None:
            copy = jax.tree.map(jnp.copy, state)
            if self._layout is not None:
                copy = jax.device_put(copy, self._layout.rows.state)
            self._rows = dataclasses.replace(self._rows, state=copy)
            self._used[:] = True
        self._asked: list[Request] = [_NOBODY] * size
        self._starts = [0] * size
        self._settings = self._stack(self._asked)
        self._processor, self._solver = processor, solver
        self._generated: jax.Array | None = None  # kept apart from the rows: few programs need it

    def enqueue(
        self, turn: Turn, asked: Mapping[int, Request], starts: Mapping[int, int]
    ) -> Ticket:
        """Hands a turn to the device.

        Args:
          turn: what to do.
          asked: requests by id.
          starts: tokens that the row of each request has before its prompt, by id.
        """
        if turn.feed is None:
            return self._decode(turn.ends, turn.steps)
        for id, row in zip(turn.feed.ids, turn.feed.rows, strict=True):
            self._asked[row], self._starts[row] = asked[id], starts[id]
        self._settings = self._stack(self._asked)
        if not self._counts:
            self._generated = None
        elif self._generated is None:
            self._generated = self._no_counts(self.size)
        return self._alone(turn.feed) if turn.feed.alone else self._together(turn.feed)

    def collect(self, ticket: Ticket) -> Result:
        """Waits for what a turn has produced."""
        new, scores, ended, most = jax.device_get(tuple(ticket[1:]))
        tokens: list[list[int]] = [[] for _ in range(self.size)]
        logprobs: list[list[float]] = [[] for _ in range(self.size)]
        top: list[list[dict[int, float]]] = [[] for _ in range(self.size)]
        reasons = [programs.RUNNING] * self.size
        for i, row in enumerate(ticket.rows):
            count = int((new[i] >= 0).sum())
            tokens[row], logprobs[row] = new[i, :count].tolist(), scores[i, :count].tolist()
            if n := self._asked[row].top_logprobs:
                top[row] = as_dicts(most.ids[i, :count, :n], most.logprobs[i, :count, :n])
            reasons[row] = int(ended[i])
        return Result(tokens, logprobs, reasons, top)

    def state_of(self, row: int) -> ModelState:
        """A copy of what a row holds."""
        layout = Layout.of(self._packed, 1, self.capacity)
        return programs.take.on(layout)(self._rows, np.int32(row)).state

    def forget(self, row: int) -> None:
        """Gives up the marks of a row."""
        self._marks[row] = {}

    def grow(self, capacity: int) -> None:
        """Makes room for more tokens in every row."""
        self._layout = Layout.of(self._packed, self.size, capacity)
        self._rows = programs.grow.on(self._layout)(self._rows, capacity, self._appends)
        for marks in self._marks:
            for place, one in marks.items():
                state = dataclasses.replace(one.state, capacity=capacity)
                marks[place] = dataclasses.replace(one, state=state)
        self.capacity = capacity

    def _decode(self, ends: Sequence[int], steps: int) -> Ticket:
        ending = np.zeros(self.size, bool)
        ending[list(ends)] = True
        rows, *out = programs.decode.on(self._layout, self._counts)(
            self._packed,
            self._counted(),
            ending,
            np.int32(min(steps, MOST_STEPS)),
            self._settings,
            **self._options,
            solver=self._solver,
        )
        self._keep(rows)
        return Ticket(range(self.size), *out)

    def _together(self, feed: Feed) -> Ticket:
        """Feeds all prompts in one program, in place."""
        stale = np.zeros(self.size, bool)
        for row, continued in zip(feed.rows, feed.continued, strict=True):
            stale[row] = self._used[row] and not continued
        if stale.any():
            self._rows = programs.clear.on(self._layout)(self._rows, stale)
        fresh = not self._used.any()
        for row in feed.rows:
            self._rows = self._begin(self._layout, self._rows, row, row)
        self._used[list(feed.rows)] = True
        self._rows, self._logits = self._prefill(
            self._layout, self._rows, self._logits, dict(zip(feed.rows, feed.rows, strict=True)),
            self._settings, fresh,
        )  # fmt: skip
        starts = np.zeros(self.size, bool)
        starts[list(feed.rows)] = True
        left = np.array([request.max_new_tokens for request in self._asked], np.int32)
        rows, *out = programs.first.on(self._layout, self._counts)(
            self._counted(), self._logits, starts, left, self._settings, **self._options
        )
        self._keep(rows)
        return Ticket(range(self.size), *out)

    def _alone(self, feed: Feed) -> Ticket:
        """Feeds one prompt to a row of its own, which then takes its place."""
        (row,), (goes_on,) = feed.rows, feed.continued
        request, layout = self._asked[row], Layout.of(self._packed, 1, self.capacity)
        one, logits = programs.empty.on(layout)(self._packed, 1, self.capacity)
        if goes_on:
            one = programs.take.on(layout)(self._rows, np.int32(row))
        settings = self._stack([request])
        one = self._begin(layout, one, 0, row)
        one, logits = self._prefill(layout, one, logits, {0: row}, settings, fresh=not goes_on)
        if self._counts:
            one = dataclasses.replace(one, generated=self._no_counts(1))
        left = np.array([request.max_new_tokens], np.int32)
        one, *out = programs.first.on(layout, self._counts)(
            one, logits, np.ones(1, bool), left, settings, **self._options
        )
        rows = programs.insert.on(self._layout, self._counts)(self._counted(), one, np.int32(row))
        self._keep(rows)
        self._used[row] = True
        return Ticket(feed.rows, *out)

    def _prefill(
        self,
        layout: Layout | None,
        rows: Rows,
        logits: jax.Array,
        fed: Mapping[int, int],
        settings: Settings,
        fresh: bool,
    ) -> tuple[Rows, jax.Array]:
        """Feeds prompts in pieces, which end at the marks.

        `fed`: for the places in `rows` that get something, the row of the engine that it is for;
        `fresh`: no row holds anything yet.
        """
        size = len(logits)
        done = dict.fromkeys(fed, 0)
        while pieces := {at: piece for at in fed if (piece := self._next(fed[at], done[at]))}:
            longest = max(map(len, pieces.values()))
            width = min(power_of_two(longest, SMALLEST_CHUNK), self.chunk)
            tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
            for at, piece in pieces.items():
                tokens[at, : len(piece)], lengths[at] = piece, len(piece)
                done[at] += len(piece)
            rows, logits = programs.prefill.on(layout)(
                self._packed, rows, logits, tokens, lengths, settings.num_iter, fresh=fresh,
                solver=self._solver,
            )  # fmt: skip
            fresh = False
            for at in pieces:
                place = self._starts[fed[at]] + done[at]
                if place in self._asked[fed[at]].marks:
                    alone = Layout.of(self._packed, 1, self.capacity)
                    self._marks[fed[at]][place] = programs.mark.on(alone)(
                        rows, np.int32(at), self._appends
                    )
        return rows, logits

    def _next(self, row: int, done: int) -> Sequence[int]:
        """The piece of a row's prompt that comes after `done` tokens."""
        request = self._asked[row]
        ends = [end for mark in request.marks if (end := mark - self._starts[row]) > done]
        return request.prompt[done : min([done + self.chunk, *ends])]

    def _begin(self, layout: Layout | None, rows: Rows, at: int, row: int) -> Rows:
        """Brings a row, which is at this place of `rows`, to where its request begins."""
        request, marks = self._asked[row], self._marks[row]
        if request.back_to is not None:
            rows = programs.insert.on(layout)(rows, marks[request.back_to], np.int32(at))
        kept = [place for place in request.marks if place <= self._starts[row]]
        self._marks[row] = {place: marks[place] for place in kept}
        return rows

    @property
    def _counts(self) -> bool:
        """Whether a row asks for something that needs to know what was generated."""
        return self._settings.counts or self._processor is not None

    @property
    def _options(self) -> dict[str, Any]:
        """What the programs that choose tokens are compiled for."""
        most = max(request.top_logprobs for request in self._asked)
        top = min(power_of_two(most), self._logits.shape[1]) if most else 0
        return {"top": top, "processor": self._processor}

    def _counted(self) -> Rows:
        return dataclasses.replace(self._rows, generated=self._generated)

    def _keep(self, rows: Rows) -> None:
        self._generated = rows.generated
        self._rows = dataclasses.replace(rows, generated=None)

    def _no_counts(self, size: int) -> jax.Array:
        split = None if self._layout is None else self._layout.other
        return jnp.zeros((size, self._logits.shape[1]), jnp.int32, device=split)

    def _stack(self, asked: Sequence[Request]) -> Settings:
        return stack_settings(
            self._own,
            [request.sampling for request in asked],
            [request.eos_ids for request in asked],
            [request.num_iter for request in asked],
            [request.min_new_tokens for request in asked],
        )
