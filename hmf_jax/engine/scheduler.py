"""Which request runs where, and what the device does next. Plain Python: no arrays, no device.

    scheduler = Scheduler(limits)
    scheduler.submit(id, ask)
    turn = scheduler.plan(steps)                    # what to do; None: there is nothing to do now
    events = scheduler.commit(turn, result)         # what came of it, for each request

A turn is made of numbers only, so a run can be printed, compared and replayed. One more turn may be
planned before the last one is committed: the device does turns one after the other, so what the
last one frees can be used by the next, but what it produces is not known yet. A row that may have
ended meanwhile is simply decoded on, which the device makes a no-op.

A row has ended when the device says so; counts here are upper bounds while a turn is under way.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import time
from array import array
from collections.abc import Callable
from typing import NamedTuple

from hmf_jax.engine.books import Ask, Draft, Limits, Row, Stats, widths
from hmf_jax.engine.prefixes import Found
from hmf_jax.engine.radix import common
from hmf_jax.engine.slots import Slots
from hmf_jax.engine.turn import (
    REASONS,
    Chunk,
    Event,
    Finished,
    First,
    New,
    Result,
    Save,
    Scored,
    Started,
    Turn,
)

LOOK = 128  # so many of the requests that wait are looked at in each turn


class _Part(NamedTuple):
    """A row's part in a turn that is under way: its slot there, and most tokens that come of it."""

    row: Row
    slot: int
    tokens: int


class Scheduler:
    """Slots, pages and the prefix cache, shared out among requests.

    Args:
      limits: what there is.
      clock: seconds; only for telling how long requests waited.

    Attributes:
      limits: what there is.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self._waiting: list[Row] = []  # in their order; those that are swapped out, too
        self._equal: collections.Counter[object] = collections.Counter()  # that wait, by their key
        self._rows: dict[int, Row] = {}  # that have not ended, by id
        self._number = 0  # of requests
        self._events: list[Event] = []  # to be told with those of the next turn
        self._counts, self._draft = Stats(), Draft()
        self._begin()

    def _begin(self) -> None:
        """Books of a device that holds nothing."""
        self._slots = Slots(self.limits, self._draft, self._enqueue, self._counts)
        self._prefixes = self._slots.prefixes
        self._flight: dict[int, list[_Part]] = {}  # turns that are not committed
        self._replies: list[Row] = []  # that have ended, but a snapshot of which may be taken

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, something is to be done, or an event to be told."""
        return bool(self._rows or self._events or self._replies or not self._draft.empty)

    def submit(self, id: int, ask: Ask) -> None:
        """Puts a request into the queue.

        Raises:
          ValueError: its prompt is empty or fills a row; no new tokens are wanted.
        """
        if not 0 < len(ask.prompt) < self.limits.capacity:
            raise ValueError(
                f"A prompt of {len(ask.prompt)} tokens does not fit: it must have 1 to "
                f"{self.limits.capacity - 1} tokens, one less than the capacity of a row."
            )
        if ask.max_new_tokens < (0 if ask.scored else 1):
            raise ValueError(f"max_new_tokens={ask.max_new_tokens}: no tokens are asked for.")
        self._rows[id] = Row(id, ask, self._number, self._clock())
        self._number += 1
        self._enqueue(self._rows[id])

    def cancel(self, id: int) -> None:
        """Ends a request wherever it is; nothing happens to one that has ended."""
        if row := self._rows.get(id):
            if row.slot >= 0:
                self._draft.ends.append(row.slot)
            row.cancelled = True
            self._finish(row, "stop")

    def plan(self, steps: int) -> Turn | None:
        """The next turn, in which rows decode up to `steps` tokens; None: nothing can be done now.

        If None comes while a turn is under way, ask again after its commit.
        """
        self._prefixes.forget(lambda key: not self._equal[key])
        self._save_replies()
        self._slots.lengthen(steps)
        starts = self._admit(steps)
        if (row := next(iter(self._reading()), None)) is not None:
            self._read(row)
            if not row.unread:
                starts.append(row)
        self._slots.move_out()
        parts = {row.id: _Part(row, row.slot, self._first(row)) for row in starts}
        steps, rows, waits = self._decode(steps, starts)
        if not self._draft.due() and not steps:
            return None
        tables: list[tuple[int, ...]] = [()] * self.limits.slots if steps else []
        for row in rows if steps else ():
            comes = min(steps, self._slots.left(row))
            row.coming += comes
            first = parts[row.id].tokens if row.id in parts else 0
            parts[row.id] = _Part(row, row.slot, first + comes)
            tables[row.slot] = tuple(row.pages)
        turn = self._draft.close(tuple(tables), steps, waits)
        self._flight[turn.number] = list(parts.values())
        return turn

    def commit(self, turn: Turn | None, result: Result | None) -> list[Event]:
        """Books what a turn produced; everything there is to tell, in order."""
        if turn is not None and result is not None:
            row = self._rows.get(turn.chunk.id) if turn.chunk else None
            if row is not None and row.ask.scored and result.scores:
                self._events.append(Scored(row.id, list(result.scores), list(result.top_scores)))
            for part in self._flight.pop(turn.number):
                part.row.coming -= part.tokens
                if part.row.state != "ended":
                    self._book(part, result)
                elif REASONS[result.reasons[part.slot]] == "error" and part.row.cancelled:
                    self._slots.spoil(part.row)
        told, self._events = self._events, []
        return told

    def fail(self) -> list[Event]:
        """The device has lost what it held: everything ends with "error", and the books are those
        of a device that holds nothing. Turns that are under way must not be committed.

        Returns:
          All events that have not been told.
        """
        told = [*self._events, *(Finished(id, "error") for id in self._rows)]
        self._rows, self._waiting, self._events = {}, [], []
        self._equal.clear()
        self._draft.clear()
        self._begin()
        return told

    def reset_prefixes(self) -> int:
        """Gives up all entries of the prefix cache; how many there were."""
        return self._prefixes.reset()

    def grow(self, capacity: int, pages: int) -> None:
        """Makes room for more tokens per row, with more pages.

        Raises:
          ValueError: less than there is; pages in several groups, which would change theirs.
        """
        if capacity < self.limits.capacity or pages < self.limits.pages or self.limits.groups > 1:
            raise ValueError(
                f"capacity={capacity} and pages={pages} cannot follow {self.limits}: both can only "
                "grow, and only with one group."
            )
        self.limits = dataclasses.replace(self.limits, capacity=capacity, pages=pages)
        self._slots.grow(self.limits)

    def stats(self) -> Stats:
        """Where everything is, and what has been counted."""
        slots, prefixes = self._slots, self._prefixes
        states = collections.Counter(row.state if row else "free" for row in slots.rows)
        waiting = [row for row in self._waiting if row.state == "waiting"]
        return dataclasses.replace(
            self._counts,
            running=states["prefill"] + states["decode"],
            waiting=len(waiting),
            swapped=len(slots.swapped),
            slots={state: states[state] for state in ("free", "prefill", "decode")},
            pages=slots.pages.counts(),
            prefix_bytes=prefixes.bytes(),
            entries=prefixes.counts(),
            evictions=dict(self._counts.evictions),
            missed=dict(self._counts.missed),
            queued_tokens=sum(len(row.prompt) for row in waiting),
            prefill_tokens=sum(row.unread for row in self._reading()),
        )

    # Requests that wait.

    def _enqueue(self, row: Row) -> None:
        bisect.insort(self._waiting, row, key=lambda row: row.order)
        self._count(row, 1)

    def _dequeue(self, row: Row) -> None:
        self._waiting.remove(row)
        self._count(row, -1)

    def _count(self, row: Row, by: int) -> None:
        """Keeps count of the equal prompts that wait; scored ones are read in any case."""
        if row.state != "swapped" and not row.ask.scored:
            self._equal[row.key] += by
            if not self._equal[row.key]:
                del self._equal[row.key]

    def _admit(self, steps: int) -> list[Row]:
        """Lets in requests that wait; those of which nothing is left to be read."""
        starts, reading = [], self._reading()
        for row in self._waiting[:LOOK]:
            if None not in self._slots.rows and not self._slots.below(row):
                break
            if row.state == "swapped":
                if not self._slots.resume(row, steps):
                    break  # nobody takes the pages that it waits for
                self._waiting.remove(row)
                reading = self._reading()
                continue
            found = self._find(row)
            unread = len(row.prompt) - found.length
            if self._waits(row, found, reading) or not self._lane(row, unread, reading):
                continue
            if not self._start(row, found, reading):
                break
            reading = self._reading()
            if not row.unread:
                starts.append(row)
        return starts

    def _find(self, row: Row) -> Found:
        if row.ask.scored:  # all of its prompt has to be read
            return Found(missed="")
        if row.found is None or row.version != self._prefixes.version:
            row.found = self._prefixes.find(row.ask.namespace, row.prompt)
            row.version = self._prefixes.version
        return row.found

    def _waits(self, row: Row, found: Found, reading: list[Row]) -> bool:
        """Whether to wait since a prompt that is being read begins alike, and a snapshot of the
        common beginning will be taken. That is asked anew in each turn, so nobody waits in vain."""
        if row.ask.scored or found.length == len(row.prompt):
            return False
        return any(
            # Those of less urgent ones may take long.
            other.ask.priority <= row.ask.priority
            and not other.ask.scored
            and (other.key == row.key or self._shares(row, found, other))
            for other in reading
        )

    def _shares(self, row: Row, found: Found, other: Row) -> bool:
        """Whether a prompt that is being read will leave a snapshot that is of use for another. If
        none is planned where the two part, that is done now."""
        if self.limits.mode == "off" or row.ask.namespace != other.ask.namespace:
            return False
        if row.shared[0] != other.id:  # prompts are compared once, not in every turn
            row.shared = other.id, common(row.prompt, other.prompt)
        last, spacing = min(row.shared[1], len(row.prompt) - 1), self.limits.spacing
        last = self._prefixes.place(last)
        cut = max((at for at in other.cuts if at <= last), default=0)
        if last > other.done and last - max(cut, found.length) >= spacing:
            bisect.insort(other.cuts, last)
            cut = last
        return cut - found.length >= spacing

    def _lane(self, row: Row, unread: int, reading: list[Row]) -> bool:
        """Whether a prompt's turn to be read has come: nobody as urgent is being read, or one that
        has more than four times as much left. That one is overtaken only once per chunk."""
        if not unread:
            return True
        before = [r for r in reading if r.ask.priority <= row.ask.priority]
        if len(before) != 1:
            return not before
        (first,) = before
        short = unread * 4 < first.unread and not first.overtaken
        return short and first.ask.priority == row.ask.priority

    def _start(self, row: Row, found: Found, reading: list[Row]) -> bool:
        """Gives a request its slot, if there is one with enough pages."""
        if not row.ask.scored and self.limits.mode != "off":  # more may have been read meanwhile
            found = self._prefixes.find(row.ask.namespace, row.prompt)
        alone = not self._slots.running()
        if not self._slots.enter(row, found.entry):
            if not alone or found.entry is None:
                return False
            # Beside the entry there is not even room for this one row: do without.
            found = dataclasses.replace(found, entry=None, missed="evicted")
            if not self._slots.enter(row, None):
                return False
        self._dequeue(row)
        for other in reading if row.unread else ():
            other.overtaken |= other.ask.priority == row.ask.priority
        if not row.ask.scored:
            row.cuts = self._prefixes.places(row.ask.cuts, row.prompt, found)
            row.whole = self.limits.mode == "exact" and found.shared == len(row.prompt)
        if not row.started:
            self._tell_started(row, found)
        return True

    def _tell_started(self, row: Row, found: Found) -> None:
        row.started = True
        if not row.ask.scored:
            self._counts.queries += len(row.prompt)
            self._counts.hits += found.length
            missed = self._counts.missed
            if found.missed:
                lost = len(row.prompt) - found.length
                missed[found.missed] = missed.get(found.missed, 0) + lost
        waited = self._clock() - row.since
        self._events.append(Started(row.id, waited, found.length, found.missed))

    # Prompts that are read.

    def _reading(self) -> list[Row]:
        """Rows whose prompts are being read. The next chunk is one of the first: the most urgent
        one, and of those the one that has least left, which is the one that overtakes."""
        rows = [row for row in self._slots.rows if row is not None and row.state == "prefill"]
        rows = [row for row in rows if row.unread]
        return sorted(rows, key=lambda row: (row.ask.priority, row.unread, row.number))

    def _read(self, row: Row) -> None:
        """Puts the next chunk of a prompt into the turn, and the snapshot after it."""
        start, chunk, name = row.done, self.limits.chunk, row.ask.namespace
        end = min(len(row.prompt), (start // chunk + 1) * chunk, *row.cuts[:1])
        width = next(width for width in widths(chunk) if width >= end - start)
        pages, last = tuple(row.pages), end == len(row.prompt)
        self._draft.chunk = Chunk(row.id, row.slot, start, end - start, width, pages, last)
        row.done, row.overtaken = end, False
        read, held = row.prompt[:end], row.pages[: self.limits.pages_of(end)]
        self._prefixes.read(name, read)
        snapshot = None
        if row.cuts[:1] == [end]:
            del row.cuts[0]
            snapshot = self._prefixes.add(name, read, held)
        elif last and not row.ask.scored and (row.whole or self._equal[row.key]):
            snapshot = self._prefixes.add(name, read, held, logits=True, key=row.key)
        if snapshot is not None:
            self._draft.cuts.append(Save(row.slot, snapshot, logits=last))

    def _first(self, row: Row) -> int:
        """A prompt has been read: its first token is chosen, if one is wanted."""
        row.state = "decode"
        if not self._slots.most(row):
            return 0
        row.coming += 1
        self._draft.firsts.append(First(row.id, row.slot))
        return 1

    def _decode(self, steps: int, starts: list[Row]) -> tuple[int, list[Row], bool]:
        """How many tokens to decode at most, in which rows, and whether to wait for them."""
        rows = [r for r in self._slots.running() if r.state == "decode" and not self._slots.over(r)]
        waits = any(row.ask.constrained for row in (*rows, *starts))
        if (chunk := self._draft.chunk) is not None:
            steps = min(steps, -(-self.limits.interleave * chunk.width // self.limits.chunk))
        if waits:  # what a constrained row may choose next is known when its newest token is
            steps = min(steps, 1)
            rows = [row for row in rows if not (row.ask.constrained and row in starts)]
        steps = min(steps, max(map(self._slots.left, rows), default=0))
        return self._slots.fitting([row for row in starts if row in rows], steps), rows, waits

    # Requests that have ended.

    def _book(self, part: _Part, result: Result) -> None:
        """What a turn has brought a row."""
        row, slot = part.row, part.slot
        if tokens := list(result.tokens[slot]):
            row.made += tokens
            top = list(result.top[slot]) if result.top else []
            self._events.append(New(row.id, tokens, list(result.logprobs[slot]), top))
        reason = REASONS[result.reasons[slot]] if part.tokens else "length"
        if reason:
            if reason == "error":
                self._slots.spoil(row)
            self._finish(row, reason)

    def _finish(self, row: Row, reason: str) -> None:
        """Ends a request, wherever it is."""
        del self._rows[row.id]
        self._events.append(Finished(row.id, reason))
        if row.state == "waiting":
            self._dequeue(row)
        elif row.state == "swapped":
            self._dequeue(row)
            self._slots.leave_host(row, row.saved)
        elif self.limits.mode == "fast" and reason in ("eos", "length") and not row.ask.scored:
            self._replies.append(row)  # its slot is saved before anybody else has it
        else:  # nobody has looked at what a cancelled row wrote last
            self._slots.leave(row, sound=reason != "stop")
        row.state = "ended"

    def _save_replies(self) -> None:
        """Prompts and replies together: what the next message of a conversation may begin with. The
        newest token has not been fed."""
        for row in self._replies:
            tokens = row.prompt + array("i", row.made[:-1])
            found = self._prefixes.find(row.ask.namespace, tokens)
            if len(tokens) - max((0, *found.lengths)) >= self.limits.spacing:
                pages = row.pages[: self.limits.pages_of(len(tokens))]
                snapshot = self._prefixes.add(row.ask.namespace, tokens, pages)
                if snapshot is not None:
                    self._draft.saves.append(Save(row.slot, snapshot))
            self._slots.leave(row, sound=True)
        self._replies = []
