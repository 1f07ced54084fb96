"""Which row has which slot and which pages, and how it gets there and away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from hmf_jax.engine.books import Draft, Limits, Row, Stats
from hmf_jax.engine.pages import HostPages, Pages
from hmf_jax.engine.prefixes import Entry, Prefixes
from hmf_jax.engine.turn import Load, Save


class Slots:
    """The slots, and what rows in them use; all changes are written into the draft of a turn.

    Args:
      limits: what there is.
      draft: the turn that is being written.
      requeue: gets rows that have lost their slot and wait for one again.
      counts: where preemptions and evictions are counted.

    Attributes:
      rows: of each slot; None: it is free. One that has ended may still be there, until what it
        holds has been saved.
      swapped: rows that are in host memory.
    """

    def __init__(
        self, limits: Limits, draft: Draft, requeue: Callable[[Row], None], counts: Stats
    ) -> None:
        self.limits, self._draft, self._requeue, self._counts = limits, draft, requeue, counts
        self.rows: list[Row | None] = [None] * limits.slots
        self.pages = Pages(limits.pages, limits.groups, draft)
        self._host = HostPages(draft)
        self.prefixes = Prefixes(limits, self.pages, self._host, draft, counts)
        self.swapped: list[Row] = []

    def grow(self, limits: Limits) -> None:
        """There are more pages, and rows may have more tokens."""
        self.limits = self.prefixes.limits = limits
        self.pages.grow(limits.pages)

    def running(self, group: int | None = None) -> list[Row]:
        """Rows that have slots, of one group or all; the most urgent ones first."""
        rows = [row for row in self.rows if row is not None and row.state != "ended"]
        if group is not None:
            rows = [row for row in rows if self.limits.group_of(row.slot) == group]
        return sorted(rows, key=_order)

    def below(self, row: Row) -> list[Row]:
        """Rows that may be swapped out for one that waits, the least urgent one first. Not too many
        at a time, since each takes host memory."""
        if len(self.swapped) >= self.limits.slots:
            return []
        below = [
            other
            for other in self.rows
            if other is not None and other.ask.priority > row.ask.priority
            if other.state != "ended" and not self.over(other)
        ]
        return sorted(below, key=_order, reverse=True)

    def most(self, row: Row) -> int:
        """Most new tokens it can have. The newest one needs no place, but the device stops a row
        as soon as one more token would fill it."""
        return min(row.ask.max_new_tokens, self.limits.capacity - len(row.prompt))

    def left(self, row: Row) -> int:
        """Most new tokens that it can have beyond those of turns under way."""
        return self.most(row) - row.ahead

    def over(self, row: Row) -> bool:
        """Whether a row will have ended for sure when the turn under way has been committed."""
        return row.state == "decode" and self.left(row) <= 0

    def held(self, row: Row, new: int = 0) -> int:
        """Tokens that its slot holds after at most so many more: all but the newest one."""
        if row.unread:
            return row.done
        return len(row.prompt) + min(row.ahead + new, self.most(row)) - 1

    # Pages for rows that run.

    def lengthen(self, steps: int) -> None:
        """Gives rows the pages that `steps` tokens may fill; where there are none, the least urgent
        rows are swapped out."""
        for row in self.running():
            if row.state != "decode" or self.over(row):  # or it was swapped out meanwhile
                continue
            group = self.limits.group_of(row.slot)
            while row.slot >= 0 and not self._lengthen(row, steps):
                self.swap_out([r for r in self.running(group) if not self.over(r)][-1])

    def fitting(self, rows: Iterable[Row], steps: int) -> int:
        """How many of `steps` tokens rows can decode for which nobody else has to go: those that
        have only just got the pages of their prompts."""
        for row in rows:
            if not self._lengthen(row, steps):
                steps = min(steps, len(row.pages) * self.limits.page_size - self.held(row))
        return steps

    def _lengthen(self, row: Row, steps: int) -> bool:
        group = self.limits.group_of(row.slot)
        more = self.limits.pages_of(self.held(row, steps)) - len(row.pages)
        if more > 0 and not self.prefixes.room(group, more):
            return False
        row.pages += self.pages.take(group, more, row.id)
        return True

    def _beginning(self, row: Row) -> int:
        """Pages of a prompt, and of one more token, so that a row can decode after its first."""
        return self.limits.pages_of(len(row.prompt) + (self.most(row) > 1))

    # The way in.

    def enter(self, row: Row, entry: Entry | None) -> bool:
        """Gives a request a slot and the pages of its prompt, if there are any; it begins with what
        the entry has."""
        total = self._beginning(row)
        if entry is None:
            slot = self._place(row, lambda _: total)
        else:
            slot = self._place_beside(row, entry, total)
        if slot is None:
            return False
        group = self.limits.group_of(slot)
        if entry is not None:
            restored = self.prefixes.restore(entry, row.id, group)
            if restored is None:
                return False
            row.pages, row.lent = restored
            row.done = entry.length
            self._draft.loads.append(Load(slot, entry.snapshot, row.id, entry.length))
        row.pages += self.pages.take(group, total - len(row.pages), row.id)
        self._take_slot(row, slot, "prefill")
        return True

    def _place_beside(self, row: Row, entry: Entry, total: int) -> int | None:
        """A slot for a row that goes on from an entry, which must stay until it has."""
        used, lendable = entry.used, self.prefixes.lendable
        self.prefixes.use(entry)
        slot = self._place(row, lambda group: total - sum(lendable(entry, group)))
        if slot is None:
            entry.used = used
        return slot

    def _place(self, row: Row, need: Callable[[int], int]) -> int | None:
        """A free slot of a group that has as many pages as are needed there; if there is none, less
        urgent rows make room."""
        groups = list(range(self.limits.groups))
        if len(groups) > 1:
            groups.sort(key=lambda group: need(group) - self.prefixes.reach(group))
        for group in groups:
            slot = self._free(group)
            if slot is not None and self.prefixes.room(group, need(group)):
                return slot
        for group in groups:
            below = [r for r in self.below(row) if self.limits.group_of(r.slot) == group]
            theirs = (page for r in below for page in r.pages)
            if below and self.prefixes.reach(group, theirs) >= need(group):
                for other in below:
                    self.swap_out(other)
                    if self.prefixes.room(group, need(group)):
                        return self._free(group)
        return None

    def _free(self, group: int) -> int | None:
        free = (slot for slot, row in enumerate(self.rows) if row is None)
        return next((slot for slot in free if self.limits.group_of(slot) == group), None)

    def _take_slot(self, row: Row, slot: int, state: Literal["prefill", "decode"]) -> None:
        row.slot, row.state, self.rows[slot] = slot, state, row

    # The way out.

    def leave(self, row: Row, sound: bool) -> None:
        """Takes its slot and its pages from a row.

        Args:
          sound: what it has written is known to be finite.
        """
        self.rows[row.slot] = None
        row.wrote = set(row.pages) - row.lent
        if not sound:
            self.pages.soil(row.wrote)
        self.pages.give_back(row.pages)
        row.slot, row.pages, row.lent = -1, [], set()

    def spoil(self, row: Row) -> None:
        """What a row has written is not finite, which may become known when it has lost its slot:
        no entry may have it."""
        if row.slot >= 0:
            row.wrote = set(row.pages) - row.lent
        self.pages.soil(page for page in row.wrote if self.pages.used(page))
        self.prefixes.spoil(row.wrote)

    # To host memory and back.

    def swap_out(self, row: Row) -> None:
        """Moves a row to host memory. To read it again instead would give other bits."""
        if not row.done:  # nothing has been read: it waits as before
            self.leave(row, sound=True)
            row.state = "waiting"
            self._requeue(row)
            return
        draft = self._draft
        self._counts.preemptions += 1
        row.snapshot, row.saved, row.away = draft.snapshot(), draft.number, False
        draft.ends.append(row.slot)
        draft.saves.append(Save(row.slot, row.snapshot))
        pages = row.pages[: self.limits.pages_of(self.held(row))]
        row.host = [self._host.take() for _ in pages]
        draft.pages_out += zip(pages, row.host, strict=True)
        self.leave(row, sound=not row.coming and not row.unread)
        row.state = "swapped"
        self.swapped.append(row)
        self._tell_host()
        self.prefixes.squeeze()
        self._requeue(row)

    def move_out(self) -> None:
        """Moves the snapshots of swapped rows that earlier turns have taken."""
        for row in self.swapped:
            if not row.away and row.saved < self._draft.number:
                self._draft.snapshots_out.append(row.snapshot)
                row.away = True

    def resume(self, row: Row, steps: int) -> bool:
        """Brings a row back if there is a slot, and pages so that it is not the next to go."""
        if row.saved == self._draft.number:
            return False
        reading, limits = bool(row.unread), self.limits
        want = self._beginning(row) if reading else limits.pages_of(self.held(row, steps))
        most = limits.pages // limits.groups

        def need(group: int) -> int:
            others = [r for r in self.running(group) if r.state == "decode"]
            return min(want + len(others), most)

        slot = self._place(row, need)
        if slot is None:
            return False
        length, row.pages = self.held(row), self.pages.take(limits.group_of(slot), want, row.id)
        self._draft.pages_in += zip(row.host, row.pages, strict=False)
        if row.away:
            self._draft.snapshots_in.append(row.snapshot)
        self._draft.loads.append(Load(slot, row.snapshot, row.id, length, resume=not reading))
        self.leave_host(row, self._draft.number)
        self._take_slot(row, slot, "prefill" if reading else "decode")
        return True

    def leave_host(self, row: Row, used: int) -> None:
        """Gives up what a swapped row has in host memory, last used by the turn `used`."""
        self._draft.drop(row.snapshot, used)
        self._host.let_go(row.host)
        self.swapped.remove(row)
        row.host = []
        self._tell_host()

    def _tell_host(self) -> None:
        self.prefixes.swapped = len(self.swapped)
        self.prefixes.swapped_pages = sum(len(row.host) for row in self.swapped)


def _order(row: Row) -> tuple[int, bool, int]:
    return row.order
