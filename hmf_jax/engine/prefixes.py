"""Beginnings of prompts that later prompts go on from: where snapshots are, and what they cost.

    found = prefixes.find(row.ask.namespace, row.prompt)       # the longest that can be used
    cuts = prefixes.places(row.ask.cuts, row.prompt, found)    # where to take further ones
    snapshot = prefixes.add(namespace, tokens, length, pages)  # one is taken
    pages = prefixes.restore(found.entry, id, group)           # a row goes on from one

A radix tree over token ids, one per namespace, remembers what has been read, so that it is known
why a prompt found no more; some of its nodes have an entry: a snapshot and pages, on the device or
in host memory. What has to go is decided as in GreedyDual-Size (Cao and Irani, 1997): an entry is
worth the tokens that it saves per byte, added to a clock that has the worth of what went last.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from hmf_jax.engine.books import Draft, Limits, Stats
from hmf_jax.engine.pages import HostPages, Pages
from hmf_jax.engine.radix import Node, Tree

OPENING = 16  # tokens by which prompts of other namespaces are known
OPENINGS = 4096


@dataclasses.dataclass(eq=False)
class Entry:
    """A snapshot after `length` tokens and the pages that hold these tokens' keys and values.

    Attributes:
      logits: the snapshot has the logits of the next token, too.
      away: it is in host memory; `host` are its pages there.
      key: of the requests for which alone it is there, see `Row.key`; None: it stays.
      used: the turn that used it last.
      worth: tokens that it saves per byte, in comparison to the entry before it.
      rank: the lowest one has to go first; of the same worth the one that was used longest ago.
    """

    node: Node
    length: int
    snapshot: int
    pages: list[int]
    logits: bool
    key: object = None
    used: int = -1
    worth: float = 0.0
    rank: tuple[float, int] = (0.0, 0)
    away: bool = False
    host: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Found:
    """What is known of a prompt: the entry to go on from, tokens that somebody has read, the
    lengths of all entries on the way, and why there is no longer entry (see `Started`)."""

    entry: Entry | None = None
    shared: int = 0
    lengths: tuple[int, ...] = ()
    missed: str = "none"

    @property
    def length(self) -> int:
        return self.entry.length if self.entry else 0


class Prefixes:
    """The entries, within the limits' bytes.

    Attributes:
      version: changes whenever `find` could find another entry.
    """

    def __init__(
        self, limits: Limits, pages: Pages, host: HostPages, draft: Draft, counts: Stats
    ) -> None:
        self.limits, self._pages, self._host, self._draft = limits, pages, host, draft
        self._counts = counts
        self._tree = Tree()
        self._openings: dict[bytes, tuple[str, ...]] = {}  # the namespaces of the newest prompts
        self._entries: dict[int, Entry] = {}  # by snapshot
        self._clock, self._stamp = 0.0, 0
        self.version = 0
        self.swapped, self.swapped_pages = 0, 0  # rows in host memory, and their pages there

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, namespace: str, prompt: array[int]) -> Found:
        """What is known of a prompt."""
        entry, lengths, gone = None, [], 0
        nodes, shared = self._tree.walk(namespace, prompt)
        for node in nodes:
            if node.entry is not None:
                lengths.append(node.end)
                if self._usable(node.entry, len(prompt)):
                    entry = node.entry
            elif node.gone:
                gone = node.end
        best, last = entry.length if entry else 0, self.place(len(prompt) - 1)
        if best == len(prompt):
            missed = ""
        elif last < self.limits.spacing:
            missed = "short"
        elif gone > best:
            missed = "evicted"
        elif self.place(min(shared, last)) > best:
            missed = "no_snapshot"
        elif not best and self._elsewhere(namespace, prompt):
            missed = "namespace"
        else:
            missed = "none"
        return Found(entry, shared, tuple(lengths), missed)

    def place(self, tokens: int) -> int:
        """The last place for a snapshot that is not beyond so many tokens."""
        chunk = self.limits.chunk
        return tokens if self.limits.mode == "fast" else tokens // chunk * chunk

    def places(self, cuts: Sequence[int], prompt: array[int], found: Found) -> list[int]:
        """Where to take snapshots of a prompt, in numbers of tokens, ascending.

        In the order of what they are worth: where this one and an earlier one part, as others may;
        where the caller says that prompts begin to differ, the last places first; the last one that
        lies on the grid; regular ones. Each at a distance from the others.
        """
        limits, last = self.limits, len(prompt) - 1
        if limits.mode == "off":
            return []
        wanted = [found.shared, *sorted(cuts, reverse=True), last // limits.chunk * limits.chunk]
        if limits.every:
            wanted += range(limits.every, last + 1, limits.every)
        taken: list[int] = []
        for at in wanted:
            at = self.place(min(at, last))
            near = (abs(at - other) < limits.spacing for other in (0, *found.lengths, *taken))
            if at > found.length and not any(near):
                taken.append(at)
        return sorted(taken)

    def read(self, namespace: str, tokens: array[int]) -> None:
        """Remembers that this beginning of a prompt has been read."""
        if self.limits.mode != "off":
            self._tree.reach(namespace, tokens)
            opening = tokens[:OPENING].tobytes()
            known = self._openings.pop(opening, ())
            others = tuple(name for name in known if name != namespace)
            self._openings[opening] = (*others[-1:], namespace)
            if len(self._openings) > OPENINGS:
                del self._openings[next(iter(self._openings))]

    def add(
        self,
        namespace: str,
        tokens: array[int],
        pages: Sequence[int],
        *,
        logits: bool = False,
        key: object = None,
    ) -> int | None:
        """An entry for these tokens, whose snapshot this turn takes.

        Args:
          key: of requests that need it; it is made even if the limits have no room for it to stay.

        Returns:
          The number of the snapshot; None: there is no room, or there is such an entry already.
        """
        node = self._tree.reach(namespace, tokens)
        if node.entry is not None and (node.entry.logits or not logits):
            self._refresh(node)
            return None
        stays = self.limits.mode != "off" and self._fit()
        if not stays and key is None:
            return None
        if node.entry is not None:  # `_fit` may have dropped it
            self._drop(node.entry)
        start = next((before.end for before in node.before() if before.entry), 0)
        own = len(pages) - start // self.limits.page_size
        size = self.limits.snapshot_bytes + own * self.limits.page_bytes
        entry = Entry(node, node.end, self._draft.snapshot(), list(pages), logits)
        entry.key, entry.used = None if stays else key, self._draft.number
        entry.worth = (node.end - start) / max(size, 1)
        self._pages.hold(entry.pages)
        node.entry, node.gone = entry, False
        self._entries[entry.snapshot] = entry
        self._refresh(node)
        self.version += 1
        return entry.snapshot

    def use(self, entry: Entry) -> None:
        """This turn uses it: it stays where it is, and so do those before it for longer."""
        entry.used = self._draft.number
        self._refresh(entry.node)

    def lendable(self, entry: Entry, group: int) -> list[bool]:
        """Which of its pages a row can use itself; it needs copies of the others, always of the
        last one if tokens follow there: two rows would write behind the same beginning."""
        full, pages = entry.length // self.limits.page_size, self._pages
        return [
            i < full and pages.owner(page) is None and pages.group_of(page) == group
            for i, page in enumerate(entry.pages)
        ]

    def restore(self, entry: Entry, id: int, group: int) -> tuple[list[int], set[int]] | None:
        """The pages of a row that goes on from an entry, and which of them it shares with it for
        reading. `room` must have been made. None: its snapshot finds no place on the device."""
        if not entry.away:
            lent: set[int] = set()
            pages = []
            for page, lendable in zip(entry.pages, self.lendable(entry, group), strict=True):
                if lendable:
                    self._pages.lend(page, id)
                    lent.add(page)
                    pages.append(page)
                else:
                    pages += self._pages.take(group, 1, id)
                    self._draft.copies.append((page, pages[-1]))
            return pages, lent
        if not self._fit():
            return None
        pages = self._pages.take(group, len(entry.host), id)
        self._draft.snapshots_in.append(entry.snapshot)
        self._draft.pages_in += zip(entry.host, pages, strict=True)
        self._pages.hold(pages)
        host, entry.host, entry.pages, entry.away = entry.host, [], list(pages), False
        self._let_go(host)
        for page, copy in list(zip(pages, host, strict=True))[: self._full(entry)]:
            if copy in self._host:  # other entries have it, too
                self._pages.twins[page] = copy
        return pages, set(pages[: self._full(entry)])

    def reach(self, group: int, more: Iterable[int] = ()) -> int:
        """How many pages could be freed, if rows gave up `more`, at the cost of entries."""
        free, idle = self._pages.free(group), self._pages.idle(group)
        return free + len((idle | set(more)) - self._kept())

    def room(self, group: int, count: int) -> bool:
        """Frees pages until there are `count`, at the cost of entries; nothing happens if that is
        not enough."""
        if self._pages.free(group) >= count:
            return True
        if self.reach(group) < count:
            return False
        idle = self._pages.idle(group) - self._kept()
        while self._pages.free(group) < count:
            self._evict(self._least(lambda e: not e.away and not idle.isdisjoint(e.pages)))
        return True

    def squeeze(self) -> None:
        """Gives up entries in host memory, for rows that are swapped out."""
        while self._host_bytes() > self.limits.host_bytes and (e := self._least(_is_away)):
            self._counts.evictions["host"] += 1
            self._drop(e)

    def spoil(self, pages: Iterable[int]) -> None:
        """Drops entries that use one of these pages: what a failed row has written."""
        pages = set(pages)
        for entry in [e for e in self if not pages.isdisjoint(e.pages)]:
            self._drop(entry)

    def forget(self, unneeded: Callable[[object], bool]) -> None:
        """Drops entries that were there for requests only that do not need them any more."""
        for entry in [e for e in self if e.key is not None and unneeded(e.key)]:
            self._drop(entry)

    def reset(self) -> int:
        """Drops everything, also what has been read; how many entries that were."""
        count = len(self._entries)
        for entry in list(self):
            self._drop(entry)
        self._tree, self._openings = Tree(), {}
        return count

    def bytes(self) -> dict[tuple[str, str], int]:
        """See `Stats.prefix_bytes`."""
        away, each = sum(e.away for e in self), self.limits.snapshot_bytes
        pages = self._pages.cached() * self.limits.page_bytes
        return {
            ("device", "kv"): pages,
            ("device", "snapshot"): (len(self._entries) - away) * each,
            ("host", "kv"): (len(self._host) - self.swapped_pages) * self.limits.page_bytes,
            ("host", "snapshot"): away * each,
        }

    def counts(self) -> dict[str, int]:
        """Entries by place."""
        away = sum(entry.away for entry in self)
        return {"device": len(self._entries) - away, "host": away}

    def _usable(self, entry: Entry, length: int) -> bool:
        if entry.length == length:
            return entry.logits
        return self.limits.mode != "off" and self.place(entry.length) == entry.length

    def _full(self, entry: Entry) -> int:
        return entry.length // self.limits.page_size

    def _elsewhere(self, namespace: str, prompt: array[int]) -> bool:
        known = self._openings.get(prompt[:OPENING].tobytes(), ())
        return any(name != namespace for name in known)

    # What entries cost.

    def _refresh(self, node: Node) -> None:
        """An entry was of use, and with it those before it: without them it is not found again if
        it has to go."""
        self._stamp += 1
        for used in (node, *node.before()):
            if used.entry is not None:
                used.entry.rank = self._clock + used.entry.worth, self._stamp

    def _least(self, fits: Callable[[Entry], bool]) -> Entry | None:
        """The entry that is worth least of those that fit and that this turn does not use."""
        now = self._draft.number
        return min((e for e in self if e.used != now and fits(e)), key=_rank, default=None)

    def _fit(self) -> bool:
        """Makes room for one more snapshot on the device."""
        each, most = self.limits.snapshot_bytes, self.limits.device_bytes
        if each > most:
            return False
        while (sum(not e.away and e.key is None for e in self) + 1) * each > most:
            least = self._least(lambda e: not e.away and e.key is None)
            if least is None:
                return False
            self._evict(least)
        return True

    def _evict(self, entry: Entry | None) -> None:
        """It leaves the device, for host memory if it is worth more than what is there."""
        assert entry is not None, "room for pages was counted, but nothing can go"
        self._clock = max(self._clock, entry.rank[0])
        self._counts.evictions["device"] += 1
        if entry.key is not None or not self._make_host_room(entry):
            self._drop(entry)
            return
        twins = self._pages.twins
        for i, page in enumerate(entry.pages):
            if i < self._full(entry) and page in twins:
                self._host.hold(twins[page])
                entry.host.append(twins[page])
            else:
                entry.host.append(self._host.take())
                self._draft.pages_out.append((page, entry.host[-1]))
                if i < self._full(entry):
                    twins[page] = entry.host[-1]
        self._draft.snapshots_out.append(entry.snapshot)
        pages, entry.pages, entry.away = entry.pages, [], True
        self._pages.let_go(pages)

    def _make_host_room(self, entry: Entry) -> bool:
        limits = self.limits
        while True:
            full, twins = self._full(entry), self._pages.twins
            new = sum(not (i < full and p in twins) for i, p in enumerate(entry.pages))
            size = limits.snapshot_bytes + new * limits.page_bytes
            if self._host_bytes() + size <= limits.host_bytes:
                return True
            least = self._least(_is_away)
            if least is None or least.rank > entry.rank or size > limits.host_bytes:
                return False
            self._counts.evictions["host"] += 1
            self._drop(least)

    def _host_bytes(self) -> int:
        """Of entries and of rows that are swapped out."""
        snapshots = self.swapped + sum(map(_is_away, self))
        limits = self.limits
        return len(self._host) * limits.page_bytes + snapshots * limits.snapshot_bytes

    def _kept(self) -> set[int]:
        """Pages of entries that this turn uses."""
        return {p for e in self if e.used == self._draft.number for p in e.pages}

    def _drop(self, entry: Entry) -> None:
        entry.node.entry, entry.node.gone = None, entry.key is None
        del self._entries[entry.snapshot]
        self._draft.drop(entry.snapshot, entry.used)
        pages, entry.pages = entry.pages, []
        self._pages.let_go(pages)
        self._let_go(entry.host)
        self.version += 1

    def _let_go(self, host: Sequence[int]) -> None:
        self._host.let_go(host)
        twins = self._pages.twins
        if gone := {copy for copy in host if copy not in self._host}:
            for page in [page for page, copy in twins.items() if copy in gone]:
                del twins[page]


def _is_away(entry: Entry) -> bool:
    return entry.away


def _rank(entry: Entry) -> tuple[float, int]:
    return entry.rank
