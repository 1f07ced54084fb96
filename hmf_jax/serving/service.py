"""The life of requests, on the side of asyncio: admitted, given to the engine, heard of, ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from hmf_jax.engine import Engine, Event, Finished, New, Started
from hmf_jax.engine.books import Stats
from hmf_jax.engine.request import Constraint
from hmf_jax.engine.timings import Timing
from hmf_jax.serving.asks import Ask
from hmf_jax.serving.choice import Choice
from hmf_jax.serving.config import ServeConfig
from hmf_jax.serving.errors import ApiError, busy, failed, invalid
from hmf_jax.serving.grammar import Grammars
from hmf_jax.serving.metrics import Metrics
from hmf_jax.serving.reply import Reply
from hmf_jax.serving.router import Router
from hmf_jax.serving.served import Served

log = logging.getLogger(__name__)
MEASURED = 512  # tokens of a prompt that say how quickly prompts are read
FRESH, PATIENCE = 0.5, 1.0  # seconds that engines' numbers hold, and that they have to tell them
SILENCE = 60.0  # seconds without a sign of life, after which an engine counts as dead
STARTING, READY, DRAINING, DEAD = "starting", "ready", "draining", "engine_dead"
_WHY = {
    STARTING: "the server is starting: the model is being loaded",
    DRAINING: "the server is shutting down",
    DEAD: "the engine has stopped",
}


@dataclasses.dataclass
class Row:
    """A choice that the engine works on, and when things happened to it, by `time.monotonic()`."""

    reply: Reply
    choice: Choice
    engine: int
    submitted: float
    unread: int = 0  # tokens of its prompt that were not in the cache
    started: float = 0.0
    first: float = 0.0
    last: float = 0.0


class Service:
    """Gives requests to engines, and what the engines tell to those who wait for it.

    Everything but `deliver` runs in the thread of the event loop.

    Args:
      settings: of the server.
      ended: is called when the engine has died.

    Attributes:
      settings: of the server.
      state: "starting", "ready", "draining" or "engine_dead".
      served: the model, once it is there.
      metrics: numbers of all this.
      replies: that somebody waits for.
      waiting, waiting_tokens: requests that wait for a slot, and tokens of their prompts.
      running: requests that have one.
    """

    def __init__(self, settings: ServeConfig, ended: Callable[[], None] = lambda: None) -> None:
        self.settings, self.state, self._on_end = settings, STARTING, ended
        self.served: Served | None = None
        self.metrics = Metrics()
        self._grammars: Grammars | None = None
        self._asked_at = 0.0  # when the engines told their numbers
        self.replies: set[Reply] = set()
        self.waiting = self.waiting_tokens = self.running = 0
        self._speed = 0.0  # tokens per second: the best so far at reading prompts
        self._rows: dict[int, Row] = {}  # by the engine's number
        self._numbers: dict[Choice, int] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def start(
        self, make: Callable[[Callable[[list[Event]], None]], Router], served: Served
    ) -> None:
        """From now on requests are taken.

        Args:
          make: makes the engines' threads, given the function that they deliver events to.
          served: the model.
        """
        loop = asyncio.get_running_loop()

        def deliver(events: list[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(self._hear, events)

        self.served, self.settings = served, served.settings
        self._router = make(deliver)
        self._engines = [thread.engine for thread in self._router.threads]
        self._compiled = [engine.compiled() for engine in self._engines]
        self.metrics.begin(served.names[0], len(self._engines), served.cache)
        self._router.start()
        if self.state == STARTING:  # and not told to end meanwhile
            self.state = READY

    async def stop(self) -> None:
        """Ends the engine."""
        if self._grammars is not None:
            self._grammars.close()
        if self.served is not None:
            await asyncio.to_thread(self._router.stop, 10.0)

    @property
    def model(self) -> Served:
        """What is served; ApiError while it is not there."""
        if self.served is None:
            self.check()
        assert self.served is not None
        return self.served

    @property
    def alive(self) -> bool:
        """Whether the engine works: it has given a sign of life within a minute, if it is there."""
        if self.served is None or self.state == DEAD:
            return self.state != DEAD
        return self._router.alive and time.monotonic() - self._router.beat < SILENCE

    async def call(self, function: Callable[[Engine], Any]) -> list[Any]:
        """What a function of every engine returns, between two turns of it."""
        _ = self.model  # it is there
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, self._router.call(function)))
        except RuntimeError:
            raise self._dead() from None

    async def constrain(
        self, structured: dict[str, Any], *, thinking: bool, param: str
    ) -> Callable[[], Constraint]:
        """What makes the constraints of answers that keep to a grammar, see `Grammars.compile`.

        Raises ApiError: it is none, or too large; `param` is the field that has it.
        """
        served = self.model
        if self._grammars is None:
            self._grammars = Grammars(served.tokenizer, served.config.vocab_size, served.ends)
        try:
            return await self._grammars.compile(structured, thinking=thinking)
        except ValueError as e:
            raise invalid(str(e), "tools" if "tools" in structured else param) from None

    async def numbers(self) -> tuple[bytes, str]:
        """All numbers as Prometheus reads them, and their media type."""
        now = time.monotonic()
        if self.served is not None and self.alive and now - self._asked_at > FRESH:
            self._asked_at = now
            with contextlib.suppress(ApiError, TimeoutError):  # engines may be busy for long
                found = await asyncio.wait_for(self.call(_counted), PATIENCE)
                for i, (stats, compiled, timings) in enumerate(found):
                    self.metrics.engine(stats, compiled - self._compiled[i], timings, i)
            told = (device.memory_stats() or {} for device in jax.local_devices())
            self.metrics.memory(max(one.get("peak_bytes_in_use", 0) for one in told))
        return self.metrics.text()

    async def prefix_cache(self) -> list[dict[str, Any]]:
        """What the engines tell about their prefix caches, as JSON."""
        found = []
        for stats in await self.call(lambda engine: engine.stats()):
            told = dataclasses.asdict(stats)
            told["prefix_bytes"] = {f"{a}_{b}": n for (a, b), n in stats.prefix_bytes.items()}
            found.append(told)
        return found

    async def reset_prefix_cache(self) -> int:
        """Drops what no running request uses; how many prefixes."""
        dropped = await self.call(lambda engine: engine.reset_prefixes())
        self._router.forget()
        return sum(dropped)

    def check(self, tokens: int = 0) -> None:
        """Raises ApiError if a request cannot be taken now."""
        if self.state != READY:
            raise busy(_WHY[self.state], self.state, 5)
        if self.waiting + self.running >= self.settings.slots + self.settings.queue:
            raise busy(f"{self.waiting} requests are waiting already", "queue_full", 1, 429)
        if self.waiting_tokens and self.waiting_tokens + tokens > self._most_tokens:
            message = f"prompts of {self.waiting_tokens} tokens are waiting already"
            raise busy(message, "queue_full", 5, 429)

    @property
    def _most_tokens(self) -> float:
        """How many tokens may wait."""
        if self.settings.max_queued_tokens is not None:
            return self.settings.max_queued_tokens
        least = self.settings.slots * self.model.length
        return max(60 * self._speed, least) if self._speed else float("inf")

    @contextlib.contextmanager
    def open(self, ask: Ask) -> Iterator[Reply]:
        """Gives a request to the engine; whatever still runs of it at the end is cancelled.

        Raises:
          ApiError: it cannot be taken now, or the engine refuses it.
        """
        self.check(sum(len(prompt.tokens) for prompt in ask.prompts))
        choices = [Choice(ask, i, self.model) for i in range(len(ask.requests))]
        reply = Reply(ask, choices, self._cancel)
        timers = self._timers(reply)
        self.replies.add(reply)
        self._idle.clear()
        try:
            for choice in choices:
                self._submit(reply, choice)
            self._asked(ask, self._rows[self._numbers[choices[0]]].engine)
            yield reply
        finally:
            for timer in timers:
                timer.cancel()
            reply.close()
            self.replies.discard(reply)
            if not self.replies:
                self._idle.set()

    async def drain(self) -> None:
        """Takes no more requests, and waits for those that run, as long as they may go on."""
        if self.state != DEAD:
            self.state = DRAINING
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.settings.shutdown_timeout)
        for reply in list(self.replies):
            reply.fail(busy(_WHY[DRAINING], DRAINING, 5))
        with contextlib.suppress(TimeoutError):  # until they have told their clients
            await asyncio.wait_for(self._idle.wait(), 2.0)

    def abort(self, request_id: str | None) -> int:
        """Ends the requests of this name, or all; how many there were."""
        names = (request_id,)
        found = [
            reply
            for reply in self.replies
            if request_id is None or reply.ask.request_id in names or reply.ask.id in names
        ]
        for reply in found:
            headers = {"x-should-retry": "false"}
            reply.fail(ApiError(499, "the request was aborted", code="aborted", headers=headers))
        return len(found)

    def _timers(self, reply: Reply) -> list[asyncio.TimerHandle]:
        settings, loop = self.settings, asyncio.get_running_loop()

        def waited() -> None:
            if not reply.started:
                message = f"no slot became free within {settings.queue_timeout:g} seconds"
                reply.fail(busy(message, "queue_timeout", 10))

        def lasted() -> None:
            message = f"the request took more than {settings.request_timeout:g} seconds"
            headers = {"x-should-retry": "false"}
            reply.fail(ApiError(503, message, code="request_timeout", headers=headers))

        timers = [loop.call_later(settings.queue_timeout, waited)]
        if settings.request_timeout is not None:
            timers.append(loop.call_later(settings.request_timeout, lasted))
        return timers

    def _asked(self, ask: Ask, engine: int) -> None:
        first, own = ask.requests[0], self.model.config.gka
        num_iter = first.num_iter if first.num_iter is not None else own and own.num_iter
        self.metrics.asked(ask.fields.n, first.max_new_tokens, num_iter, engine)

    def _submit(self, reply: Reply, choice: Choice) -> None:
        try:
            number = self._router.submit(choice.request)
        except ValueError as e:
            raise ApiError(400, str(e)) from None
        except RuntimeError:
            raise self._dead() from None
        engine = number % len(self._engines)
        self._rows[number] = Row(reply, choice, engine, time.monotonic())
        self._numbers[choice] = number
        self._count(engine, waiting=1, tokens=len(choice.request.prompt))

    def _cancel(self, choice: Choice) -> None:
        number = self._numbers.get(choice)
        if number is not None:
            self._router.cancel(number)

    def _dead(self) -> ApiError:
        return busy(_WHY[DEAD], DEAD, 10)

    def _hear(self, events: Sequence[Event]) -> None:
        """What the engine tells, once per turn."""
        now = time.monotonic()
        made = sum(len(e.tokens) for e in events if isinstance(e, New))
        self.metrics.turn(made, events[0].id % len(self._engines))  # events of one engine
        for event in events:
            row = self._rows.get(event.id)
            if row is None:
                continue
            try:
                self._tell(row, event, now)
            except Exception:  # of a tokenizer, for example: the others have nothing to do with it
                log.exception("request %s failed", row.reply.ask.id)
                row.reply.fail(failed("the answer cannot be written, see the log of the server"))
            if isinstance(event, Finished):
                self._ended(row, event)
        if self._router.error is not None and self.state != DEAD:
            self.state = DEAD
            log.error("the engine has stopped: %r", self._router.error)
            self._on_end()

    def _tell(self, row: Row, event: Event, now: float) -> None:
        """Hands an event on to whoever waits for it."""
        if isinstance(event, Started) and not row.started:
            self._started(row, event, now)
        elif isinstance(event, New):
            self._timed(row, event, now)
        broken = getattr(row.choice.request.constraint, "error", None)
        if isinstance(event, Finished) and broken:
            told = f"the grammar cannot be kept to: {broken}"
            event = dataclasses.replace(event, reason="error", error=told)
        if not isinstance(event, Finished) or event.reason not in ("stop", "error"):
            row.reply.push(row.choice, event)
        elif not row.choice.done:  # its own fault, or the end of everything
            row.reply.fail(self._fault(row, event))

    def _count(self, engine: int, *, waiting: int = 0, running: int = 0, tokens: int = 0) -> None:
        self.waiting += waiting
        self.running += running
        self.waiting_tokens += tokens
        self.metrics.queue(waiting, running, engine)

    def _started(self, row: Row, event: Started, now: float) -> None:
        row.started, length = now, len(row.choice.request.prompt)
        row.unread = length - event.cached
        self._count(row.engine, waiting=-1, running=1, tokens=-length)
        waited = now - row.submitted
        self.metrics.started(length, event.cached, event.missed, waited, row.engine)

    def _timed(self, row: Row, event: New, now: float) -> None:
        if not row.first:
            row.first = now
            if row.unread >= MEASURED:
                self._speed = max(self._speed, row.unread / max(now - row.started, 1e-3))
            self.metrics.first(row.submitted, row.started, now, row.engine)
        since = now - row.last if row.last else None
        self.metrics.tokens(len(event.tokens), since, row.engine)
        row.last = now

    def _ended(self, row: Row, event: Finished) -> None:
        del self._rows[event.id], self._numbers[row.choice]
        choice, length = row.choice, len(row.choice.request.prompt)
        if row.started:
            self._count(row.engine, running=-1)
        else:
            self._count(row.engine, waiting=-1, tokens=-length)
        reason = event.reason if event.reason == "error" else choice.finish_reason or "abort"
        times = row.submitted, row.first, row.last
        self.metrics.ended(reason, length, choice.count, *times, row.engine)

    def _fault(self, row: Row, event: Finished) -> ApiError:
        """What to tell of a request that the engine has ended by itself."""
        if self._router.error is not None:
            return self._dead()
        if event.reason == "stop":
            return busy(_WHY[DRAINING], DRAINING, 5)
        error = event.error or "the engine has failed"
        log.error("request %s failed: %s", row.reply.ask.id, error)
        own = "NaN" in error  # of this row alone, and so it would be again
        if own:
            self.metrics.nonfinite(row.engine)
        return failed(error, again=not own and "grammar" not in error)


def _counted(engine: Engine) -> tuple[Stats, int, list[Timing]]:
    return engine.stats(), engine.compiled(), engine.timings()
