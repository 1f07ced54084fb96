"""The engine: requests in, events out; many requests share a device."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from hmf_jax.engine.books import Ask, Limits, Stats
from hmf_jax.engine.device import Device, Ticket
from hmf_jax.engine.failure import why_not_finite
from hmf_jax.engine.programs import MOST_STEPS
from hmf_jax.engine.request import (
    Request,
    check_capacity,
    check_processor,
    check_prompts,
    check_request,
    check_room,
    check_whole,
)
from hmf_jax.engine.scheduler import Scheduler
from hmf_jax.engine.settings import Processor
from hmf_jax.engine.storage import PAGE_SIZE
from hmf_jax.engine.timings import Timing, Timings
from hmf_jax.engine.turn import Event, Finished, New, Turn
from hmf_jax.model import HybridLM, check_solver
from hmf_jax.options import check_choice
from hmf_jax.sharding import row_parts

Prefixes = Literal["off", "exact", "fast"]


class Engine:
    """Continues many prompts at a time.

        engine = Engine(model, 8, capacity=4096)
        id = engine.add(Request(prompt, max_new_tokens=100))
        while engine.busy:
            for event in engine.step():
                ...  # Started, Scored, New (tokens) and Finished, each with the id of its request

    Everything runs in `step`: a piece of a prompt that waits is read, and all rows decode some
    tokens. What a request becomes does not depend on the others. One thread may use an engine.
    After an exception in `step` (not enough memory, an interrupt) what its rows hold is unknown:
    `step` and `add` say so until `recover` is called.

    Args:
      model: the model.
      slots: how many requests run at a time.
      capacity: most tokens of a row, prompt and generated tokens together.
      pages: how many pages of `page_size` tokens hold the keys and values of full attention layers,
        of all rows and of all prefixes together. None: enough for every row at its longest. With
        fewer, rows that find none wait in the memory of the host.
      prefill_chunk: prompts are read in pieces of this many tokens.
      prefixes: what to do with prompts that begin alike. "exact": what was read is found again at
        multiples of `prefill_chunk`, and the result has the bits that it would have without;
        "fast": wherever a request's `cuts` say, too, and where a reply ended, which changes the
        result by rounding; "off": nothing is kept.
      prefix_bytes: most bytes of the device for snapshots of prefixes, beside pages; None: those of
        twice as many snapshots as there are slots, at least 8.
      host_bytes: most bytes of the host's memory for prefixes.
      every: also keep a snapshot after every so many tokens, a multiple of prefill_chunk; 0: no.
      spacing: fewest tokens between two snapshots of one prompt.
      interleave: most tokens that rows decode beside a piece of prefill_chunk tokens of a prompt;
        fewer beside shorter ones, at least one. 0: rows wait while prompts can be read, so that
        most is done in all.
      processor, solver: see `hmf_jax.generate`; for all requests.
      fixed: one program decodes whatever requests ask for. Otherwise settings that nobody uses cost
        nothing, and the first request that does may wait for a compiler.
      explain: find out in which layer it began if the logits of a row are not finite; the others
        wait meanwhile.
      record: gets lines that say what was asked and what was done, prompts included; see
        `hmf_jax.engine.replay`.
      threaded: hand turns to the device in a thread of its own. A GPU's queue holds about a
        thousand kernels, so that who hands it several steps waits for most of them; meanwhile what
        the turn before has brought can be told.
      clock: seconds, for `Started.waited`.

    Raises:
      ValueError: capacity beyond the model's max_position_embeddings; anything below 1.
    """

    def __init__(
        self,
        model: HybridLM,
        slots: int,
        *,
        capacity: int,
        pages: int | None = None,
        page_size: int | None = None,
        prefill_chunk: int = 2048,
        prefixes: Prefixes = "off",
        prefix_bytes: int | None = None,
        host_bytes: int = 0,
        every: int = 0,
        spacing: int = 512,
        interleave: int = 8,
        processor: Processor | None = None,
        solver: str = "chebyshev",
        fixed: bool = False,
        explain: bool = True,
        record: Callable[[str], Any] | None = None,
        threaded: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        named = {"slots": slots, "capacity": capacity, "prefill_chunk": prefill_chunk}
        for name, value in named.items():
            check_whole(name, value, 1)
        check_choice("prefixes", prefixes, ("off", "exact", "fast"))
        check_solver(solver, model.config)
        check_processor(processor)
        if every % prefill_chunk:
            raise ValueError(f"every={every} must be a multiple of prefill_chunk={prefill_chunk}.")
        self.model, self.capacity, self.slots = model, capacity, slots
        check_capacity(model.config, capacity)
        size = min(PAGE_SIZE, capacity) if page_size is None else page_size
        check_whole("page_size", size, 1)
        if pages is None:
            # A row that goes on from a prefix copies its last page.
            pages = slots * (-(-capacity // size) + (prefixes != "off"))
        check_whole("pages", pages, -(-capacity // size))
        self._chunk, self._solver, self._explain = prefill_chunk, solver, explain
        self._options: dict[str, Any] = dict(
            slots=slots,
            pages=pages,
            page_size=size,
            prefill_chunk=prefill_chunk,
            processor=processor,
            solver=solver,
            fixed=fixed,
        )
        self._clock, self._ids, self._broken = clock, itertools.count(), ""
        self._device = Device(model, capacity=capacity, **self._options)
        parts = 1 if model.mesh is None else row_parts(model.mesh)
        if prefix_bytes is None:
            prefix_bytes = 2 * max(slots, 4) * self._device.snapshot_bytes
        self._limits = Limits(
            slots=slots,
            pages=pages,
            page_size=size,
            capacity=capacity,
            chunk=prefill_chunk,
            page_bytes=self._device.page_bytes,
            snapshot_bytes=self._device.snapshot_bytes,
            mode=prefixes,
            device_bytes=prefix_bytes,
            host_bytes=host_bytes,
            groups=parts if slots % parts == 0 else 1,  # else every device has all rows
            every=every,
            spacing=spacing,
            interleave=interleave,
        )
        self._scheduler = Scheduler(self._limits, clock=clock)
        if record is not None:
            from hmf_jax.engine.replay import Recorder  # here, since that module is also a program

            self._scheduler = Recorder(self._limits, record, clock=clock)
        self._requests: dict[int, Request] = {}  # that have not ended
        self._new: dict[int, list[int]] = {}  # tokens that each has made
        self._threaded = threaded
        self._hand = self._make_hand()
        # Handed to the device, or to the thread that does so, and not collected.
        self._pending: tuple[Turn, Callable[[], Ticket]] | None = None
        self._events: list[Event] = []  # that `step` has not told yet
        self._timings = Timings(clock)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or `step` has something to tell."""
        return self._scheduler.busy or self._pending is not None

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
          ValueError: what `check` finds wrong.
          RuntimeError: an earlier `step` raised an exception.
        """
        self._check_intact()
        request = self.check(request)
        id = next(self._ids) if id is None else id
        ask = Ask(
            request.prompt,
            request.max_new_tokens,
            priority=request.priority,
            cuts=tuple(request.cuts),
            namespace=f"{request.num_iter}/{request.namespace}",  # states depend on num_iter
            scored=request.prompt_logprobs is not None,
            constrained=request.constraint is not None,
        )
        self._scheduler.submit(id, ask)
        self._requests[id], self._new[id] = request, []
        return id

    def abort(self, id: int) -> None:
        """Ends a request wherever it is; its next event is `Finished(id, "stop")`."""
        self._scheduler.cancel(id)

    def tokens(self, id: int) -> list[int]:
        """The tokens of a request that has not ended: its prompt and the new ones."""
        return [*self._requests[id].prompt, *self._new[id]]

    def stats(self) -> Stats:
        """What runs and waits, and what the prefix cache holds and has found."""
        return self._scheduler.stats()

    def timings(self) -> list[Timing]:
        """How long the newest turns took, without those that were told before."""
        return self._timings.take()

    def reset_prefixes(self) -> int:
        """Forgets all prefixes that no request uses; how many."""
        return self._scheduler.reset_prefixes()

    def warm(self) -> None:
        """Compiles every program that requests can need."""
        self._device.warm()

    def compiled(self) -> int:
        """How many programs have been compiled."""
        return self._device.compiled()

    def nbytes(self) -> int:
        """Bytes of the device that it holds beside the model's weights."""
        return self._device.nbytes()

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in every row; what has been read stays.

        Raises:
          ValueError: less than there is, or more than max_position_embeddings allows; a mesh
            splits the slots.
        """
        if capacity < self.capacity:
            raise ValueError(f"capacity={capacity} is less than the {self.capacity} there is.")
        check_capacity(self.model.config, capacity)
        if capacity > self.capacity:
            size = self._limits.page_size
            more = self.slots * (-(-capacity // size) - -(-self.capacity // size))
            pages = self._limits.pages + more
            self._scheduler.grow(capacity, pages)
            self._device.grow(capacity, pages)
            self._limits = dataclasses.replace(self._limits, capacity=capacity, pages=pages)
            self._options["pages"], self.capacity = pages, capacity

    def step(self, steps: int = MOST_STEPS) -> list[Event]:
        """Hands the next turn to the device, and then waits for the turn before it.

        So the device has always something to do while the host works. In a turn a piece of one
        prompt is read, and all rows decode up to `steps` tokens, at most 64, on GPUs 8.

        Returns:
          What has happened to the requests, in order.

        Raises:
          RuntimeError: an earlier `step` raised an exception.
        """
        self._check_intact()
        try:
            if self._pending is not None and self._pending[0].waits:
                self._collect()
            turn = self._scheduler.plan(max(1, min(steps, self._device.most_steps)))
            handed = None if turn is None else self._enqueue(turn)
            self._collect()
            if turn is not None and handed is not None:
                self._pending = turn, handed
        except BaseException as e:
            self._broken = f"{type(e).__name__}: {e}".rstrip(": ")
            raise
        if not self.busy:
            self._timings.rest()
        told, self._events = self._events, []
        return told

    def _make_hand(self) -> ThreadPoolExecutor | None:
        return ThreadPoolExecutor(1, "device") if self._threaded else None

    def _enqueue(self, turn: Turn) -> Callable[[], Ticket]:
        """Hands a turn to the device; what waits until it has been, and returns its ticket."""
        parts = (turn.chunk, *turn.loads, *turn.firsts)
        asked = {part.id: self._requests[part.id] for part in parts if part is not None}
        last = None if self._pending is None else self._pending[1]

        def enqueue() -> Ticket:
            idle = last is None or self._device.done(last())
            ticket = self._device.enqueue(turn, asked)
            self._timings.enqueued(idle)
            return ticket

        if self._hand is not None:
            return self._hand.submit(enqueue).result
        ticket = enqueue()
        return lambda: ticket

    def recover(self) -> list[Event]:
        """Starts over with empty rows after an exception in `step`.

        Returns:
          What has not been told, and the ends of all requests that there were, with the error.
        """
        error = self._broken or "the engine was started over"
        if self._hand is not None:
            self._hand.shutdown(cancel_futures=True)
        self._hand = self._make_hand()
        self._pending, self._broken, self._timings = None, "", Timings(self._clock)
        self._device = Device(self.model, capacity=self.capacity, **self._options)
        self._scheduler.fail()
        told: list[Event] = [*self._events]
        told += [Finished(id, "error", error) for id in self._requests]
        self._requests, self._new, self._events = {}, {}, []
        return told

    def _collect(self) -> None:
        """Books what the turn that the device has been given before has produced."""
        turn = result = None
        if self._pending is not None:
            turn, handed = self._pending
            result = self._device.collect(handed())
            self._timings.collected(turn)
            self._pending = None
        for event in self._scheduler.commit(turn, result):
            self._events.append(self._booked(event))

    def _booked(self, event: Event) -> Event:
        if isinstance(event, New):
            self._new[event.id] += event.tokens
            constraint = self._requests[event.id].constraint
            if constraint is not None:
                constraint.accept(event.tokens)
        elif isinstance(event, Finished):
            request, new = self._requests.pop(event.id), self._new.pop(event.id)
            if event.reason == "error":
                event = dataclasses.replace(event, error=self._why(request, new))
        return event

    def _why(self, request: Request, new: list[int]) -> str:
        """What to tell of a request whose logits are not finite after these new tokens."""
        if not self._explain:
            return f"new token {len(new)}: the logits are NaN or infinite"
        options: dict[str, Any] = dict(chunk=self._chunk, capacity=self.capacity)
        return why_not_finite(self.model, request, new, solver=self._solver, **options)

    def _check_intact(self) -> None:
        if self._broken:
            raise RuntimeError(
                f"This engine stopped in the middle of a step ({self._broken}), so its rows may be "
                "incomplete; call recover(), or make a new one."
            )
