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
from typing import Literal, NamedTuple

from hmf_jax.engine.books import Ask, Draft, Limits, Row, Stats, widths
from hmf_jax.engine.pages import HostPages, Pages
from hmf_jax.engine.prefixes import Found, Prefixes, common
from hmf_jax.engine.turn import (
    REASONS,
    Chunk,
    Event,
    Finished,
    First,
    Load,
    New,
    Result,
    Save,
    Scored,
    Started,
    Turn,
)

LOOK = 256  # so many of the requests that wait are looked at in each turn


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
        self._queries, self._hits, self._preemptions = 0, 0, 0
        self._missed: collections.Counter[str] = collections.Counter()
        self._number = 0  # of requests
        self._events: list[Event] = []  # to be told with those of the next turn
        self._evictions = {"device": 0, "host": 0}
        self._draft = Draft()
        self._begin()

    def _begin(self) -> None:
        """Books of a device that holds nothing."""
        self._slots: list[Row | None] = [None] * self.limits.slots
        self._pages = Pages(self.limits.pages, self.limits.groups, self._draft)
        self._host = HostPages(self._draft)
        self._prefixes = Prefixes(self.limits, self._pages, self._host, self._draft)
        self._prefixes.evictions = self._evictions
        self._flight: dict[int, list[_Part]] = {}  # turns that are not committed
        self._replies: list[Row] = []  # that have ended, but a snapshot of which is to be taken
        self._ended: dict[int, tuple[int, Row]] = {}  # slots and rows, by the last commit

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
        row = Row(id, ask, self._number, self._clock())
        self._number += 1
        self._rows[id] = row
        self._count(row, 1)
        bisect.insort(self._waiting, row, key=_order)

    def cancel(self, id: int) -> None:
        """Ends a request wherever it is; nothing happens to one that has ended."""
        if row := self._rows.get(id):
            if row.slot >= 0:
                self._draft.ends.append(row.slot)
            self._finish(row, "stop")

    def plan(self, steps: int) -> Turn | None:
        """The next turn, in which rows decode up to `steps` tokens; None: nothing can be done now.

        If None comes while a turn is under way, ask again after its commit.
        """
        self._prefixes.forget(lambda key: not self._equal[key])
        self._save_replies()
        self._grow(steps)
        starts = self._admit(steps)
        if (row := self._next()) is not None:
            self._read(row)
            if not row.unread:
                starts.append(row)
        for row in self._waiting:  # what was saved by an earlier turn can go
            if row.state == "swapped" and not row.away and row.saved < self._draft.number:
                self._draft.snapshots_out.append(row.snapshot)
                row.away = True
        parts = {row.id: _Part(row, row.slot, self._first(row)) for row in starts}
        steps, decoding = self._steps(steps, starts)
        for row in decoding if steps else ():
            comes = min(steps, row.most(self.limits.capacity) - row.ahead)
            row.coming += comes
            started = parts[row.id].tokens if row.id in parts else 0
            parts[row.id] = _Part(row, row.slot, started + comes)
        if not self._draft.due and not steps:
            return None
        tables: list[tuple[int, ...]] = [()] * self.limits.slots if steps else []
        for row in decoding if steps else ():
            tables[row.slot] = tuple(row.pages)
        waits = any(row.ask.constrained for row in (*decoding, *starts))
        turn = self._draft.close(tuple(tables), steps, waits)
        self._flight[turn.number] = list(parts.values())
        return turn

    def commit(self, turn: Turn | None, result: Result | None) -> list[Event]:
        """Books what a turn produced; everything there is to tell, in order."""
        told, self._events = self._events, []
        if turn is not None and result is not None:
            self._ended = {}
            row = self._rows.get(turn.chunk.id) if turn.chunk else None
            if row is not None and row.ask.scored:
                self._events.append(Scored(row.id, list(result.scores), list(result.top_scores)))
            for part in self._flight.pop(turn.number):
                part.row.coming -= part.tokens
                if part.row.state != "ended":  # or it was cancelled, or ended a turn ago
                    self._book(part, result)
            told += self._events
            self._events = []
        return told

    def fail(self) -> list[Event]:
        """The device has lost what it held: everything that runs ends with "error"; what waits goes
        on waiting. All events that have not been told."""
        told, self._events = self._events, []
        for row in list(self._rows.values()):
            if row.state != "waiting":
                told.append(Finished(row.id, "error"))
                row.state = "ended"
                del self._rows[row.id]
        self._waiting = [row for row in self._waiting if row.state == "waiting"]
        for row in self._waiting:
            row.found = None
        self._draft.clear()
        self._begin()
        return told

    def slot(self, id: int) -> int | None:
        """The slot of a request that runs, or has ended in the turn that was committed last."""
        if row := self._rows.get(id):
            return row.slot if row.slot >= 0 else None
        return self._ended[id][0] if id in self._ended else None

    def tokens(self, id: int) -> list[int]:
        """Prompt and new tokens of a request that has not ended before the last commit.

        Raises KeyError for others.
        """
        return (self._rows.get(id) or self._ended[id][1]).tokens

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
        self._prefixes.limits = self.limits
        self._pages.grow(pages)

    def stats(self) -> Stats:
        """Where everything is, and what has been counted."""
        states = collections.Counter(row.state if row else "free" for row in self._slots)
        waiting = [row for row in self._waiting if row.state == "waiting"]
        return Stats(
            running=states["prefill"] + states["decode"],
            waiting=len(waiting),
            swapped=len(self._waiting) - len(waiting),
            slots={state: states[state] for state in ("free", "prefill", "decode")},
            pages=self._pages.counts(),
            prefix_bytes=self._prefixes.bytes(),
            entries=self._prefixes.counts(),
            evictions=dict(self._evictions),
            queries=self._queries,
            hits=self._hits,
            missed=dict(self._missed),
            preemptions=self._preemptions,
            queued_tokens=sum(len(row.prompt) for row in waiting),
            prefill_tokens=sum(row.unread for row in self._running() if row.state == "prefill"),
        )

    def _running(self, group: int | None = None) -> list[Row]:
        """Rows that have slots, of one group or all; the most urgent ones first."""
        rows = [row for row in self._slots if row is not None and row.state != "ended"]
        here = [r for r in rows if group is None or self.limits.group_of(r.slot) == group]
        return sorted(here, key=_order)

    def _over(self, row: Row) -> bool:
        """Whether a row will have ended for sure when the turn under way has been committed."""
        return row.state == "decode" and row.ahead >= row.most(self.limits.capacity)

    # Pages for rows that run.

    def _held(self, row: Row, new: int) -> int:
        """Tokens that its slot holds after so many more new tokens: all but the newest one."""
        return len(row.prompt) + min(row.ahead + new, row.most(self.limits.capacity)) - 1

    def _grow(self, steps: int) -> None:
        """Gives rows the pages that `steps` tokens may fill; where there are none, the least urgent
        rows are swapped out."""
        for row in self._running():
            if row.state != "decode" or self._over(row):  # or it was swapped out meanwhile
                continue
            group = self.limits.group_of(row.slot)
            more = self.limits.pages_of(self._held(row, steps)) - len(row.pages)
            while row.slot >= 0 and not self._prefixes.room(group, more):
                self._swap_out([r for r in self._running(group) if not self._over(r)][-1])
            if row.slot >= 0 and more > 0:
                row.pages += self._pages.take(group, more, row.id)

    def _swap_out(self, row: Row) -> None:
        """Moves a row to host memory. To read it again instead would give other bits."""
        if not row.done:  # nothing has been read: it waits as before
            self._leave_slot(row, sound=True)
            row.state = "waiting"
            self._count(row, 1)
            bisect.insort(self._waiting, row, key=_order)
            return
        draft, self._preemptions = self._draft, self._preemptions + 1
        row.snapshot, row.saved, row.away = draft.snapshot(), draft.number, False
        draft.ends.append(row.slot)
        draft.saves.append(Save(row.slot, row.snapshot))
        held = row.done if row.unread else self._held(row, 0)
        pages = row.pages[: self.limits.pages_of(held)]
        row.host = [self._host.take() for _ in pages]
        draft.pages_out += zip(pages, row.host, strict=True)
        self._prefixes.swapped += 1
        self._prefixes.swapped_pages += len(pages)
        self._leave_slot(row, sound=not row.coming and not row.unread)
        self._prefixes.squeeze()
        row.state = "swapped"
        bisect.insort(self._waiting, row, key=_order)

    def _resume(self, row: Row, steps: int) -> bool:
        """Brings a row back if there is a slot, and pages so that it is not the next to go."""
        if row.saved == self._draft.number:
            return False
        reading, limits = bool(row.unread), self.limits
        held = row.done if reading else self._held(row, 0)
        want = limits.pages_of(self._with_first(row) if reading else self._held(row, steps))
        most = limits.pages // limits.groups

        def need(group: int) -> int:
            others = [r for r in self._running(group) if r.state == "decode"]
            return min(want + len(others), most)

        slot = self._place(row, need)
        if slot is None:
            return False
        self._waiting.remove(row)
        row.pages = self._pages.take(limits.group_of(slot), want, row.id)
        self._draft.pages_in += zip(row.host, row.pages, strict=False)
        if row.away:
            self._draft.snapshots_in.append(row.snapshot)
        self._draft.loads.append(Load(slot, row.snapshot, row.id, held, resume=not reading))
        self._leave_host(row, self._draft.number)
        self._take_slot(row, slot, "prefill" if reading else "decode")
        return True

    # Requests that wait.

    def _admit(self, steps: int) -> list[Row]:
        """Lets in requests that wait; those of which nothing is left to be read."""
        starts = []
        for row in self._waiting[:LOOK]:
            if None not in self._slots and not self._below(row):
                break
            if row.state == "swapped":
                if not self._resume(row, steps):
                    break  # nobody takes the pages that it waits for
                continue
            found = self._find(row)
            unread = len(row.prompt) - found.length
            if self._waits(row, found) or (unread and not self._lane(row, unread)):
                continue
            if not self._start(row, found):
                break
            if not row.unread:
                starts.append(row)
        return starts

    def _below(self, row: Row) -> list[Row]:
        """Rows that may be swapped out for one that waits, the least urgent one first. Not too many
        at a time, since each takes host memory."""
        if sum(r.state == "swapped" for r in self._waiting) >= self.limits.slots:
            return []
        below = [r for r in self._running() if r.ask.priority > row.ask.priority]
        return [r for r in reversed(below) if not self._over(r)]

    def _find(self, row: Row) -> Found:
        if row.ask.scored:  # all of its prompt has to be read
            return Found(missed="")
        if row.found is None or row.version != self._prefixes.version:
            row.found = self._prefixes.find(row.ask.namespace, row.prompt)
            row.version = self._prefixes.version
        return row.found

    def _waits(self, row: Row, found: Found) -> bool:
        """Whether to wait since a prompt that is being read begins alike, and a snapshot of the
        common beginning will be taken. That is asked anew in each turn, so nobody waits in vain."""
        if row.ask.scored or found.length == len(row.prompt):
            return False
        for other in self._running():
            if not other.unread or other.ask.scored:
                continue
            if other.ask.priority > row.ask.priority:  # it may take long
                continue
            if other.key == row.key:
                return True  # for the end of its prompt
            if self.limits.mode == "off" or other.ask.namespace != row.ask.namespace:
                continue
            if other.id not in row.shared:
                row.shared[other.id] = common(row.prompt, other.prompt)
            top = self._prefixes.place(min(row.shared[other.id], len(row.prompt) - 1))
            cut = max((at for at in other.cuts if at <= top), default=0)
            spacing = self.limits.spacing
            if top > other.done and top - max(cut, found.length) >= spacing:
                bisect.insort(other.cuts, top)
                cut = top
            if cut - found.length >= spacing:
                return True
        return False

    def _lane(self, row: Row, unread: int) -> bool:
        """Whether a prompt's turn to be read has come: nobody as urgent is being read, or one who
        has more than four times as much left. That one is overtaken only once per chunk."""
        reading = [r for r in self._running() if r.state == "prefill" and r.unread]
        before = [r for r in reading if r.ask.priority <= row.ask.priority]
        if len(before) != 1:
            return not before
        (first,) = before
        short = unread * 4 < first.unread and not first.overtaken
        return short and first.ask.priority == row.ask.priority

    def _start(self, row: Row, found: Found) -> bool:
        """Gives a request its slot and the pages of its prompt, if there are any."""
        if not row.ask.scored and self.limits.mode != "off":  # more may have been read meanwhile
            found = self._prefixes.find(row.ask.namespace, row.prompt)
        total = self.limits.pages_of(self._with_first(row))
        entry, slot = found.entry, None
        if entry is not None:
            used = entry.used
            self._prefixes.use(entry)
            slot = self._place(row, lambda g: total - sum(self._prefixes.lendable(entry, g)))
            if slot is None:
                entry.used = used
            if slot is None and not self._running():
                # Beside the entry there is not even room for this one row: do without.
                entry, found = None, dataclasses.replace(found, entry=None)
        if entry is None:
            slot = self._place(row, lambda _: total)
        if slot is None:
            return False
        group = self.limits.group_of(slot)
        if entry is not None:
            restored = self._prefixes.restore(entry, row.id, group)
            if restored is None:
                return False
            row.pages, row.lent = restored
            row.done = entry.length
            self._draft.loads.append(Load(slot, entry.snapshot, row.id, entry.length))
        row.pages += self._pages.take(group, total - len(row.pages), row.id)
        for other in self._running():
            if other.state == "prefill" and other.ask.priority == row.ask.priority and row.unread:
                other.overtaken = True
        self._waiting.remove(row)
        self._count(row, -1)
        self._take_slot(row, slot, "prefill")
        if not row.ask.scored:
            row.cuts = self._prefixes.places(row.ask.cuts, row.prompt, found)
            row.whole = self.limits.mode == "exact" and found.shared == len(row.prompt)
        if not row.started:
            self._tell_started(row, found)
        return True

    def _tell_started(self, row: Row, found: Found) -> None:
        row.started = True
        if not row.ask.scored:
            self._queries += len(row.prompt)
            self._hits += found.length
            self._missed[found.missed] += len(row.prompt) - found.length
        waited = self._clock() - row.since
        self._events.append(Started(row.id, waited, found.length, found.missed))

    def _place(self, row: Row, need: Callable[[int], int]) -> int | None:
        """A free slot of a group that has as many pages as are needed there; if there is none, less
        urgent rows make room."""
        limits, prefixes = self.limits, self._prefixes

        def free(group: int) -> int | None:
            slots = (s for s, r in enumerate(self._slots) if r is None)
            return next((s for s in slots if limits.group_of(s) == group), None)

        groups = sorted(range(limits.groups), key=lambda g: need(g) - prefixes.reach(g))
        for group in groups:
            if free(group) is not None and prefixes.room(group, need(group)):
                return free(group)
        for group in groups:
            below = [r for r in self._below(row) if limits.group_of(r.slot) == group]
            if below and prefixes.reach(group, (p for r in below for p in r.pages)) >= need(group):
                for victim in below:
                    self._swap_out(victim)
                    if prefixes.room(group, need(group)):
                        return free(group)
        return None

    # Prompts that are read.

    def _with_first(self, row: Row) -> int:
        """Tokens of a prompt, and one more so that a row can decode right after its first token."""
        return len(row.prompt) + (row.most(self.limits.capacity) > 1)

    def _next(self) -> Row | None:
        """Whose chunk is next: of the most urgent ones the one that has the least left, which is
        the one that overtakes."""
        reading = [row for row in self._running() if row.state == "prefill" and row.unread]
        return min(reading, key=lambda r: (r.ask.priority, r.unread, r.number), default=None)

    def _read(self, row: Row) -> None:
        """Puts the next chunk of a prompt into the turn, and the snapshots after it."""
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
        if not row.most(self.limits.capacity):
            return 0
        row.coming += 1
        self._draft.firsts.append(First(row.id, row.slot))
        return 1

    def _steps(self, steps: int, starts: list[Row]) -> tuple[int, list[Row]]:
        """How many tokens to decode, and which rows do."""
        rows = [r for r in self._running() if r.state == "decode" and not self._over(r)]
        if any(row.ask.constrained for row in rows):
            # What is allowed next is known when the newest token is: after a first one not yet.
            steps = min(steps, 0 if any(row.ask.constrained for row in starts) else 1)
        steps = min(steps, max((r.most(self.limits.capacity) - r.ahead for r in rows), default=0))
        for row in starts:  # others have their pages; for these nobody has to go
            group = self.limits.group_of(row.slot)
            more = self.limits.pages_of(self._held(row, steps)) - len(row.pages)
            if more > 0 and self._prefixes.room(group, more):
                row.pages += self._pages.take(group, more, row.id)
            elif more > 0:
                steps = min(steps, len(row.pages) * self.limits.page_size - self._held(row, 0))
        return steps, rows

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
            self._ended[row.id] = slot, row
            if reason == "error":
                written = set(row.pages) - row.lent
                self._pages.soil(written)
                self._prefixes.spoil(written)
            self._finish(row, reason)

    def _finish(self, row: Row, reason: str) -> None:
        """Ends a request, wherever it is."""
        del self._rows[row.id]
        self._events.append(Finished(row.id, reason))
        if row.state in ("waiting", "swapped"):
            self._waiting.remove(row)
        if row.state == "waiting":
            self._count(row, -1)
        if row.state == "swapped":
            self._leave_host(row, row.saved)
        replies = self.limits.mode == "fast" and reason in ("eos", "length") and row.made
        if row.slot >= 0 and replies and not row.ask.scored:
            self._replies.append(row)  # the next turn saves its slot, before anybody else has it
        elif row.slot >= 0:
            # Nobody has looked at what a cancelled row wrote last.
            self._leave_slot(row, sound=reason != "stop")
        row.state = "ended"

    def _save_replies(self) -> None:
        """Prompts and replies together: what the next message of a conversation may begin with."""
        for row in self._replies:
            tokens = row.prompt + array("i", row.made[:-1])
            found = self._prefixes.find(row.ask.namespace, tokens)
            if len(tokens) - max((0, *found.lengths)) >= self.limits.spacing:
                pages = row.pages[: self.limits.pages_of(len(tokens))]
                snapshot = self._prefixes.add(row.ask.namespace, tokens, pages)
                if snapshot is not None:
                    self._draft.saves.append(Save(row.slot, snapshot))
            self._leave_slot(row, sound=True)
        self._replies = []

    def _count(self, row: Row, by: int) -> None:
        """Keeps count of equal prompts that wait; scored ones are none, since nothing is shared."""
        if not row.ask.scored:
            self._equal[row.key] += by
            if not self._equal[row.key]:
                del self._equal[row.key]

    def _take_slot(self, row: Row, slot: int, state: Literal["prefill", "decode"]) -> None:
        row.slot, row.state, self._slots[slot] = slot, state, row

    def _leave_slot(self, row: Row, sound: bool) -> None:
        """`sound`: what it has written is known to be finite."""
        self._slots[row.slot] = None
        if not sound:
            self._pages.soil(set(row.pages) - row.lent)
        self._pages.give_back(row.pages)
        row.slot, row.pages, row.lent = -1, [], set()

    def _leave_host(self, row: Row, used: int) -> None:
        self._draft.drop(row.snapshot, used)
        self._host.let_go(row.host)
        self._prefixes.swapped -= 1
        self._prefixes.swapped_pages -= len(row.host)
        row.host = []


def _order(row: Row) -> tuple[int, bool, int]:
    return row.order
