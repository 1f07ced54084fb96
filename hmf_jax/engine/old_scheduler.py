"""Which request gets which row, and what the device does next. Pure Python: no arrays, no device.

    turn = scheduler.plan(steps)                    # what to do; None: nothing is left to do
    events = scheduler.commit(turn, result)         # what came of it, for each request

A turn is made of numbers only, so a run can be printed, compared and replayed. A row has ended when
the device says so: its `Result` carries the reason, and nothing here counts tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hmf_jax.engine.turn import REASONS, Event, Finished, New, Started


class Feed(NamedTuple):
    """Prompts to be read, one per row, and a first token to be chosen for each.

    Attributes:
      ids: the requests.
      rows: their rows.
      alone: prefill outside of the rows and insert the result: one request, so that its activations
        take no more memory than those of one chunk. Otherwise all rows are fed in one program.
      continued: for each, whether its row goes on with what it holds.
    """

    ids: tuple[int, ...]
    rows: tuple[int, ...]
    alone: bool
    continued: tuple[bool, ...]


class Turn(NamedTuple):
    """What the device does in one go: feed prompts, or end some rows and decode `steps` tokens."""

    feed: Feed | None = None
    ends: tuple[int, ...] = ()
    steps: int = 0


class Result(NamedTuple):
    """What a turn produced, row by row: new tokens, their logprobs, why the row has ended (a
    number, an index of `REASONS`), and the most likely tokens, if they were asked for."""

    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    reasons: Sequence[int]
    top: Sequence[Sequence[dict[int, float]]] = ()


@dataclasses.dataclass
class _Ask:
    """A request as the scheduler sees it."""

    id: int
    after: int | None
    keep: bool
    since: float


class Scheduler:
    """First come, first served: a request gets the first free row, or that of the one it follows.

    Args:
      rows: how many requests can run at a time.
      together: feed all that wait and fit in one program, instead of one by one.
      held: requests (ids) whose rows hold something at the start: row i that of held[i].
      clock: seconds; for how long requests waited.
    """

    def __init__(
        self,
        rows: int,
        *,
        together: bool = False,
        held: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._together, self._clock = together, clock
        self._queue: collections.deque[_Ask] = collections.deque()
        self._running: dict[int, _Ask] = {}  # row -> request
        self._held = {id: row for row, id in enumerate(held)}
        self._claimed: set[int | None] = set()  # held requests that one in the queue comes after
        self._free = list(range(len(held), rows))
        self._ends: list[int] = []  # rows of aborted requests, which the device still decodes
        self._events: list[Event] = []  # to be told with those of the next turn

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or an event has not been told yet."""
        return bool(self._queue or self._running or self._events)

    @property
    def held(self) -> dict[int, int]:
        """Requests that have ended and were kept, and their rows."""
        return dict(self._held)

    def row(self, id: int) -> int | None:
        """The row of a request that runs or is held."""
        running = (row for row, ask in self._running.items() if ask.id == id)
        return next(running, self._held.get(id))

    def submit(self, id: int, *, after: int | None = None, keep: bool = False) -> None:
        """Puts a request into the queue.

        Raises:
          ValueError: `after` names a request that is not held.
        """
        if after is not None:
            if after not in self._held or after in self._claimed:
                raise ValueError(
                    f"request {after} is not held, so nothing can come after it; add it with "
                    "keep=True, wait until it has ended, and continue it once"
                )
            self._claimed.add(after)
        self._queue.append(_Ask(id, after, keep, self._clock()))

    def cancel(self, id: int) -> None:
        """Ends a request wherever it is; nothing happens to one that has ended."""
        for ask in [ask for ask in self._queue if ask.id == id]:
            self._queue.remove(ask)
            self._claimed.discard(ask.after)
            self._events.append(Finished(id, "stop"))
        for row, ask in list(self._running.items()):
            if ask.id == id:
                self._ends.append(row)
                self._end(row, "stop", self._events)

    def release(self, id: int) -> None:
        """Gives the row of a held request to others.

        Raises:
          ValueError: it is not held, or a request in the queue comes after it.
        """
        if id not in self._held or id in self._claimed:
            why = "a request in the queue comes after it" if id in self._held else "it is not held"
            raise ValueError(f"request {id} cannot be released: {why}")
        self._free_row(self._held.pop(id))

    def plan(self, steps: int) -> Turn | None:
        """The next turn: feed what waits if a row is free for it, else decode `steps` tokens.

        None if the device has nothing to do.
        """
        if fed := self._admit():
            feed = Feed(
                ids=tuple(ask.id for _, ask in fed),
                rows=tuple(row for row, _ in fed),
                alone=not self._together,
                continued=tuple(ask.after is not None for _, ask in fed),
            )
            self._ends = [row for row in self._ends if row not in feed.rows]
            return Turn(feed)
        if self._running:
            ends, self._ends = tuple(self._ends), []
            return Turn(None, ends, steps)
        return None

    def commit(self, turn: Turn | None, result: Result | None) -> list[Event]:
        """Books what a turn produced; everything there is to tell, in order."""
        events, self._events = self._events, []
        if turn is None or result is None:
            return events
        for row, ask in sorted(self._running.items()):
            if tokens := list(result.tokens[row]):
                top = list(result.top[row]) if result.top else []
                events.append(New(ask.id, tokens, list(result.logprobs[row]), top))
            if reason := REASONS[result.reasons[row]]:
                self._end(row, reason, events)
        return events

    def _admit(self) -> list[tuple[int, _Ask]]:
        """Rows for the requests that are next in the queue."""
        fed: list[tuple[int, _Ask]] = []
        for ask in list(self._queue):
            if fed and not self._together:
                break
            if ask.after is not None:
                row = self._held.pop(ask.after)
                self._claimed.remove(ask.after)
            elif self._free:
                row = self._free.pop(0)
            else:  # others in the queue may have a row that waits for them
                continue
            self._queue.remove(ask)
            self._running[row] = ask
            self._events.append(Started(ask.id, self._clock() - ask.since))
            fed.append((row, ask))
        return fed

    def _end(self, row: int, reason: str, events: list[Event]) -> None:
        ask = self._running.pop(row)
        events.append(Finished(ask.id, reason))
        if ask.keep and reason != "error":
            self._held[ask.id] = row
        else:
            self._free_row(row)

    def _free_row(self, row: int) -> None:
        self._free.append(row)
        self._free.sort()
