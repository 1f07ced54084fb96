"""The engine: requests in, events out; many requests share the rows of one batch."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping

from hmf_jax.engine.buffers import Buffers
from hmf_jax.engine.failure import first_bad_layer, first_bad_state
from hmf_jax.engine.old_scheduler import Result, Scheduler
from hmf_jax.engine.programs import ERROR, MOST_STEPS
from hmf_jax.engine.request import Request, check_prompts, check_request, check_room, check_whole
from hmf_jax.engine.settings import Processor
from hmf_jax.engine.turn import Event, New, Started
from hmf_jax.model import HybridLM, check_solver
from hmf_jax.padding import check_state
from hmf_jax.state import ModelState


class Engine:
    """Continues many prompts at a time.

        engine = Engine(model, rows=8, capacity=4096)
        id = engine.add(Request(prompt, max_new_tokens=100))
        while engine.busy:
            for event in engine.step():
                ...  # Started, New (tokens) and Finished, each with the id of its request

    Everything runs in `step`: prompts that wait get free rows and are fed, or all rows decode some
    tokens. What a request becomes does not depend on the others. One thread may use an engine.
    After an exception in `step` (not enough memory, an interrupt) its rows are in an unknown state:
    it can only be asked for `context`, and `step` and `add` say so.

    Args:
      model: the model.
      rows: how many requests run at a time; see `hmf_jax.memory.plan_memory` for how many fit.
      capacity: most tokens of a row, prompts and generated tokens together.
      prefill_chunk: prompts are fed in pieces of this many tokens; never changes the result.
      together: feed all prompts that wait and find a row in one program. By default they are fed
        one by one, so that their activations take no more memory than those of one chunk.
      state: what the rows hold at first, one row each (a copy is made); `held` are the ids to
        continue them by: `Request(prompt, after=engine.held[row])`.
      processor, solver: see `hmf_jax.generate`; for all requests.
      clock: seconds, for `Started.waited`.

    Raises:
      ValueError: capacity beyond the model's max_position_embeddings; anything below 1; a state
        that does not fit.
    """

    def __init__(
        self,
        model: HybridLM,
        rows: int,
        *,
        capacity: int,
        prefill_chunk: int = 2048,
        together: bool = False,
        state: ModelState | None = None,
        processor: Processor | None = None,
        solver: str = "chebyshev",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (
            ("rows", rows),
            ("capacity", capacity),
            ("prefill_chunk", prefill_chunk),
        ):
            check_whole(name, value, 1)
        if state is not None:
            check_state(model, state, len(state.length))
        check_solver(solver, model.config)
        if processor is not None and not callable(processor):
            raise ValueError(f"processor={processor!r} must be a function of logits and context.")
        if state is not None and (len(state.length), state.capacity) != (rows, capacity):
            raise ValueError(
                f"The state holds {len(state.length)} rows of {state.capacity} tokens at most, but "
                f"{rows=} and {capacity=}."
            )
        self.model, self.capacity = model, capacity
        self._ahead = 0 if state is None else int((state.position - state.length).max())
        self._check_capacity(capacity)
        self._buffers = Buffers(
            model,
            rows,
            capacity=capacity,
            prefill_chunk=prefill_chunk,
            state=state,
            processor=processor,
            solver=solver,
        )
        self._chunk, self._solver, self._broken = prefill_chunk, solver, ""
        self._ids = itertools.count()
        held = [] if state is None else [next(self._ids) for _ in range(rows)]
        lengths = [] if state is None else state.length.tolist()
        self._scheduler = Scheduler(rows, together=together, held=held, clock=clock)
        self._requests: dict[int, Request] = {}  # that wait or run
        self._starts: dict[int, int] = {}  # tokens in the rows of these, before their prompts
        self._rows = {id: _Row(n) for id, n in zip(held, lengths, strict=True)}  # by request

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or `step` has something to tell."""
        return self._scheduler.busy

    @property
    def held(self) -> list[int]:
        """The ids of requests whose rows keep what they hold, in the order of the rows."""
        rows = self._scheduler.held
        return sorted(rows, key=rows.__getitem__)

    def context(self, id: int) -> list[int]:
        """The tokens in the row of a request that runs or is held, without those of a `state`.

        The newest generated token is not one of them: it is fed when the next one is needed.

        Raises:
          ValueError: the request has no row: it waits, or it has ended and was not kept.
        """
        if id not in self._rows:
            raise ValueError(f"request {id} has no row: it waits, or has ended and was not kept")
        return list(self._rows[id].tokens)

    def new_id(self) -> int:
        """A number for a request, see `add`. Any thread may ask for one."""
        return next(self._ids)

    def check(self, request: Request) -> Request:
        """The request with its prompt as a list. Any thread may call it.

        Raises:
          ValueError: a prompt that is empty, not made of token ids or too long; num_iter without
            GKA layers; a bias of a token that there is not.
        """
        check_request(self.model.config, request)
        (prompt,) = check_prompts([request.prompt], self.model.config.vocab_size)
        if request.after is None:
            check_room(self.model.config, [prompt], [0], self.capacity)
        return dataclasses.replace(request, prompt=prompt)

    def add(self, request: Request, id: int | None = None) -> int:
        """Queues a request.

        Args:
          request: the request.
          id: from `new_id`; None: a new one.

        Returns:
          Its id, which its events carry.

        Raises:
          ValueError: what `check` finds wrong; `after` a request that is not held; `back_to` or
            `marks` that its row does not have.
          RuntimeError: an earlier `step` raised an exception.
        """
        self._check_intact()
        request = self.check(request)
        prompt = request.prompt
        before = (None if request.after is None else self._rows.get(request.after)) or _Row()
        held = before.held if request.back_to is None else request.back_to
        if request.back_to is not None and held not in before.marks:
            raise ValueError(f"back_to={held} is not one of the marks {list(before.marks)}.")
        for place in request.marks:
            kept = place <= held and place in before.marks
            if not kept and not held < place <= held + len(prompt):
                raise ValueError(
                    f"a mark at {place} is not in the prompt, which fills the row from {held} to "
                    f"{held + len(prompt)} tokens."
                )
        check_room(self.model.config, [prompt], [held], self.capacity)
        id = next(self._ids) if id is None else id
        self._scheduler.submit(id, after=request.after, keep=request.keep)
        self._starts[id] = held
        self._requests[id] = request
        return id

    def abort(self, id: int) -> None:
        """Ends a request wherever it is; its next event is `Finished(id, "stop")`."""
        self._scheduler.cancel(id)

    def release(self, id: int) -> None:
        """Gives up the row of a held request.

        Raises:
          ValueError: it is not held, or a request in the queue comes after it.
        """
        row = self._scheduler.row(id)
        self._scheduler.release(id)
        if row is not None:
            self._buffers.forget(row)
        del self._rows[id]

    def marks(self, id: int) -> list[int]:
        """Where a request can go back to that comes after this one, see `Request.marks`; ascending.

        Raises ValueError as `context` does.
        """
        self.context(id)
        return sorted(self._rows[id].marks)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in every row; what the rows hold stays.

        Raises:
          ValueError: less than there is, or more than max_position_embeddings allows.
        """
        if capacity < self.capacity:
            raise ValueError(f"capacity={capacity} is less than the {self.capacity} there is.")
        self._check_capacity(capacity)
        if capacity > self.capacity:
            self._buffers.grow(capacity)
            self.capacity = capacity

    def step(self, steps: int = MOST_STEPS) -> list[Event]:
        """Feeds prompts that wait if rows are free, else decodes up to `steps` (at most 64) tokens.

        Returns:
          What has happened to the requests, in order.

        Raises:
          RuntimeError: a request waits for a row, but all are held and none will become free by
            itself; or an earlier `step` raised an exception.
        """
        self._check_intact()
        turn = self._scheduler.plan(max(steps, 1))
        result = None
        if turn is not None:
            try:
                ticket = self._buffers.enqueue(turn, self._requests, self._starts)
                result = self._buffers.collect(ticket)
            except BaseException as e:
                self._broken = f"{type(e).__name__}: {e}".rstrip(": ")
                raise
        failed = self._failed(result)
        events = self._scheduler.commit(turn, result)
        if turn is None and not events and self.busy:
            raise RuntimeError(
                f"All rows are held ({self.held}), so no request that waits can begin: release one."
            )
        return [self._booked(event, failed) for event in events]

    def _failed(self, result: Result | None) -> dict[int, int]:
        """Requests whose logits are not finite, and their rows."""
        if result is None or ERROR not in result.reasons:
            return {}
        rows = {id: self._scheduler.row(id) for id in self._requests}
        return {id: row for id, row in rows.items() if row is not None}

    def _booked(self, event: Event, failed: Mapping[int, int]) -> Event:
        if isinstance(event, Started):
            request = self._requests[event.id]
            row = _Row() if request.after is None else self._rows.pop(request.after)
            self._rows[event.id] = row.fed(request, self._starts.pop(event.id))
        elif isinstance(event, New):
            self._rows[event.id].push(event.tokens)
        else:
            self._starts.pop(event.id, None)
            request = self._requests.pop(event.id)
            if event.reason == "error":
                event = dataclasses.replace(
                    event, error=self._why(request, event.id, failed[event.id])
                )
            if not request.keep or event.reason == "error":
                self._rows.pop(event.id, None)
        return event

    def _why(self, request: Request, id: int, place: int) -> str:
        """What to tell of a request whose logits, made in the row `place`, are not finite."""
        row, model = self._rows[id], self.model
        what = f"new token {row.made}: the logits are NaN or infinite"
        if row.before:  # tokens of a state, which are not known
            where = first_bad_state(model, self._buffers.state_of(place))
            unknown = "the states of all layers are finite, so look at the last layer and the head"
        else:
            where = first_bad_layer(
                model,
                row.tokens if row.newest is None else [*row.tokens, row.newest],
                num_iter=request.num_iter,
                solver=self._solver,
                chunk=self._chunk,
                capacity=self.capacity,
            )
            unknown = "the model's own are finite, so look at biases, penalties and the processor"
        return f"{what}; {unknown if where is None else f'the first to be so is {where}'}"

    def _check_intact(self) -> None:
        if self._broken:
            raise RuntimeError(
                f"This engine stopped in the middle of a step ({self._broken}), so its rows may be "
                "incomplete; make a new one."
            )

    def _check_capacity(self, capacity: int) -> None:
        longest = self.model.config.max_position_embeddings
        if capacity + self._ahead > longest:
            raise ValueError(
                f"capacity={capacity} is more than max_position_embeddings={longest} allows; "
                "choose a smaller one, or raise max_position_embeddings in the model's config."
            )


@dataclasses.dataclass
class _Row:
    """What a row holds: tokens of a `state`, those fed since; the newest, not fed yet; and how many
    its request has made."""

    before: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    newest: int | None = None
    marks: tuple[int, ...] = ()
    made: int = 0

    @property
    def held(self) -> int:
        return self.before + len(self.tokens)

    def fed(self, request: Request, start: int) -> _Row:
        tokens = [*self.tokens[: start - self.before], *request.prompt]
        return _Row(self.before, tokens, marks=tuple(request.marks))

    def push(self, new: list[int]) -> None:
        if new and self.newest is not None:
            self.tokens.append(self.newest)
        self.tokens += new[:-1]
        self.newest = new[-1] if new else self.newest
        self.made += len(new)
