"""A batch of prompts that begin and decode together: nobody joins, and no row is used twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.engine import programs
from hmf_jax.engine.failure import why_not_finite
from hmf_jax.engine.programs import MOST_STEPS, SMALLEST_CHUNK, Layout, as_dicts, power_of_two
from hmf_jax.engine.request import (
    GREEDY,
    Request,
    capacity_for,
    check_capacity,
    check_processor,
    check_room,
    check_whole,
)
from hmf_jax.engine.settings import Processor, Settings, stack_settings
from hmf_jax.engine.turn import REASONS, Event, Finished, New
from hmf_jax.model import HybridLM, check_solver
from hmf_jax.packed import PackedModel
from hmf_jax.padding import check_state
from hmf_jax.state import ModelState

_NOBODY = Request((), 1, GREEDY)  # asks for nothing, in rows that only fill up the batch


class Batch:
    """Continues all prompts side by side, each in a row with room for `capacity` tokens.

        batch = Batch(model, requests)
        while batch.busy:
            for event in batch.step():
                ...  # New (tokens) and Finished; their ids are places in `requests`

    The first step feeds all prompts, `prefill_chunk` tokens of each at a time, and chooses a token
    for each; later ones decode. For requests that come and go, see `Engine`.

    Args:
      model: the model.
      asked: one request per row. What only an `Engine` does is left out of them: priority, cuts,
        namespace, constraint, prompt_logprobs.
      capacity, prefill_chunk, state, processor, solver: see `hmf_jax.generate`.

    Attributes:
      asked: the requests.
      capacity: most tokens of a row.

    Raises:
      ValueError: what `hmf_jax.generate` raises; before anything runs.
    """

    def __init__(
        self,
        model: HybridLM,
        asked: Sequence[Request],
        *,
        capacity: int | None = None,
        prefill_chunk: int = 2048,
        state: ModelState | None = None,
        processor: Processor | None = None,
        solver: str = "chebyshev",
    ) -> None:
        check_whole("prefill_chunk", prefill_chunk, 1)
        if capacity is not None:
            check_whole("capacity", capacity, 1)
        check_solver(solver, model.config)
        check_processor(processor)
        held, ahead, size = [0] * len(asked), 0, len(asked)
        if state is None:
            needed = max(len(request.prompt) + request.max_new_tokens for request in asked)
            capacity = capacity_for(model.config, needed, capacity)
            size = power_of_two(size)  # batches of similar sizes share programs
        else:
            check_state(model, state, size)
            if capacity not in (None, state.capacity):
                raise ValueError(
                    f"{capacity=}, but the state was made for {state.capacity} tokens per row; "
                    "leave out capacity."
                )
            held, capacity = state.length.tolist(), state.capacity
            ahead = int((state.position - state.length).max())
        check_capacity(model.config, capacity, ahead)
        check_room(model.config, [request.prompt for request in asked], held, capacity)
        self.model, self.capacity = model, capacity
        self.asked, self._held, self._size = list(asked), held, size
        self._chunk, self._solver = prefill_chunk, solver
        self._packed = PackedModel.of(model)
        self._layout = Layout.of(self._packed, size, capacity)
        self._settings = _stack(model, [*asked, *[_NOBODY] * (size - len(asked))])
        self._counts = self._settings.counts or processor is not None
        most = max(request.top_logprobs for request in asked)
        top = min(power_of_two(most), model.config.vocab_size) if most else 0
        self._options: dict[str, Any] = {"top": top, "processor": processor}
        self._fresh = state is None
        self._rows, self._logits = self._begin(state)
        self._made: list[list[int]] = [[] for _ in asked]
        self._running = set(range(len(asked)))
        self._ends: list[int] = []  # rows that were ended from outside, which the device still runs
        self._fed = False

    @property
    def busy(self) -> bool:
        """Whether a row runs, or `step` has something to tell."""
        return bool(self._running or self._ends)

    def abort(self, id: int) -> None:
        """Ends a row that runs; its next event is `Finished(id, "stop")`."""
        if id in self._running:
            self._running.remove(id)
            self._ends.append(id)

    def step(self, steps: int = MOST_STEPS) -> list[Event]:
        """Feeds all prompts, the first time; later decodes up to `steps` (at most 64) tokens.

        Returns:
          What has happened to the rows, in their order.
        """
        ends, self._ends = self._ends, []
        events: list[Event] = [Finished(id, "stop") for id in ends]
        if not self._running:
            return events
        if self._fed:
            tokens, logprobs, reasons, top = self._decode(ends, steps)
        else:
            tokens, logprobs, reasons, top = self._feed()
        for id in sorted(self._running):
            count = int((tokens[id] >= 0).sum())
            if count:
                new, most = tokens[id, :count].tolist(), []
                if n := self.asked[id].top_logprobs:
                    most = as_dicts(top.ids[id, :count, :n], top.logprobs[id, :count, :n])
                self._made[id] += new
                events.append(New(id, new, logprobs[id, :count].tolist(), most))
            if reason := REASONS[reasons[id]]:
                self._running.remove(id)
                error = self._why(id) if reason == "error" else None
                events.append(Finished(id, reason, error))
        return events

    def _begin(self, state: ModelState | None) -> tuple[programs.Rows, jax.Array]:
        """Rows that hold nothing, or a copy of `state`."""
        if state is None:
            return programs.empty.on(self._layout)(self._packed, self._size, self.capacity)
        room = 1  # of the state that `state` takes the place of
        layout = Layout.of(self._packed, self._size, room)
        rows, logits = programs.empty.on(layout)(self._packed, self._size, room)
        copy = jax.tree.map(jnp.copy, state)
        if self._layout is not None:
            copy = jax.device_put(copy, self._layout.rows.state)
        return dataclasses.replace(rows, state=copy), logits

    def _feed(self) -> Any:
        """Reads all prompts and chooses the first tokens; returns what `_decode` does."""
        self._fed, rows, logits = True, self._rows, self._logits
        prompts = [request.prompt for request in self.asked]
        for start in range(0, max(map(len, prompts)), self._chunk):
            pieces = [prompt[start : start + self._chunk] for prompt in prompts]
            width = min(power_of_two(max(map(len, pieces)), SMALLEST_CHUNK), self._chunk)
            tokens = np.zeros((self._size, width), np.int32)
            lengths = np.zeros(self._size, np.int32)
            for row, piece in enumerate(pieces):
                tokens[row, : len(piece)], lengths[row] = piece, len(piece)
            rows, logits = programs.prefill.on(self._layout)(
                self._packed, rows, logits, tokens, lengths, self._settings.num_iter,
                fresh=self._fresh and start == 0, solver=self._solver,
            )  # fmt: skip
        if self._counts:
            split = None if self._layout is None else self._layout.other
            counts = jnp.zeros(logits.shape, jnp.int32, device=split)
            rows = dataclasses.replace(rows, generated=counts)
        starts, left = np.zeros(self._size, bool), np.ones(self._size, np.int32)
        starts[list(self._running)] = True
        left[: len(self.asked)] = [request.max_new_tokens for request in self.asked]
        self._rows, *out = programs.first.on(self._layout, self._counts)(
            rows, logits, starts, left, self._settings, **self._options
        )
        del self._logits
        return jax.device_get(tuple(out))

    def _decode(self, ends: Sequence[int], steps: int) -> Any:
        """Tokens and logprobs [B, n], reasons [B], and the most likely tokens; on the host."""
        ending = np.zeros(self._size, bool)
        ending[list(ends)] = True
        self._rows, *out = programs.decode.on(self._layout, self._counts)(
            self._packed,
            self._rows,
            ending,
            np.int32(min(max(steps, 1), MOST_STEPS)),
            self._settings,
            **self._options,
            solver=self._solver,
        )
        return jax.device_get(tuple(out))

    def _why(self, id: int) -> str:
        """What to tell of a row whose logits are not finite."""
        held = self._rows.state.gather(jnp.array([id])) if self._held[id] else None
        return why_not_finite(
            self.model, self.asked[id], self._made[id], state=held, solver=self._solver,
            chunk=self._chunk, capacity=self.capacity,
        )  # fmt: skip


def _stack(model: HybridLM, asked: Sequence[Request]) -> Settings:
    gka = model.config.gka
    return stack_settings(
        None if gka is None else gka.num_iter,
        [request.sampling for request in asked],
        [request.eos_ids for request in asked],
        [request.num_iter for request in asked],
        [request.min_new_tokens for request in asked],
    )
