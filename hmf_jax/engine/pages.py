"""Who uses which page: running rows, entries of the prefix cache, both, or nobody."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterable

from hmf_jax.engine.books import Draft


class Pages:
    """The pool of pages on the device.

    A page belongs to at most one running row, which alone writes it, and to any number of entries,
    which only read it: up to their length a row never writes it again. It is free when it belongs
    to nobody.

    Args:
      count: pages.
      groups: parts of the pool, of equal size, in order.
      draft: the turn that is being written; pages of rows that failed are zeroed by it.
    """

    def __init__(self, count: int, groups: int, draft: Draft) -> None:
        self.groups, self._draft = groups, draft
        self._owner: list[int | None] = []
        self._entries: list[int] = []  # how many hold each page
        self._free: list[list[int]] = [[] for _ in range(groups)]  # heaps: the lowest number first
        self._soiled: set[int] = set()
        self.twins: dict[int, int] = {}  # pages that have a copy in host memory -> its number
        self.grow(count)

    def __len__(self) -> int:
        return len(self._owner)

    def grow(self, count: int) -> None:
        """Adds pages, so that there are `count`."""
        new = range(len(self), count)
        self._owner += [None] * len(new)
        self._entries += [0] * len(new)
        for page in new:
            heapq.heappush(self._free[page * self.groups // count], page)

    def group_of(self, page: int) -> int:
        return page * self.groups // len(self)

    def free(self, group: int) -> int:
        """How many are free."""
        return len(self._free[group])

    def owner(self, page: int) -> int | None:
        """The row that uses it."""
        return self._owner[page]

    def used(self, page: int) -> bool:
        """Whether it belongs to anybody."""
        return self._owner[page] is not None or self._entries[page] > 0

    def idle(self, group: int) -> set[int]:
        """Pages that only entries use."""
        size = len(self) // self.groups
        here = range(group * size, (group + 1) * size)
        return {p for p in here if self._owner[p] is None and self._entries[p]}

    def counts(self) -> dict[str, int]:
        """Pages by use, see `Stats.pages`."""
        free = sum(map(len, self._free))
        held = sum(owner is not None for owner in self._owner)
        return {"free": free, "held": held, "cached": len(self) - free - held}

    def cached(self) -> int:
        """Pages that entries use, rows or not."""
        return sum(count > 0 for count in self._entries)

    def take(self, group: int, count: int, id: int) -> list[int]:
        """Free pages for a row; there must be so many."""
        pages = [heapq.heappop(self._free[group]) for _ in range(count)]
        for page in pages:
            self._owner[page] = id
        return pages

    def lend(self, page: int, id: int) -> None:
        """A page that only entries use serves a row, too."""
        assert self._owner[page] is None and self._entries[page], (page, id)
        self._owner[page] = id

    def give_back(self, pages: Iterable[int]) -> None:
        """The row that has used them does not any more."""
        for page in pages:
            self._owner[page] = None
            self._settle(page)

    def hold(self, pages: Iterable[int]) -> None:
        """One more entry uses them."""
        for page in pages:
            self._entries[page] += 1

    def let_go(self, pages: Iterable[int]) -> None:
        """One entry less uses them."""
        for page in pages:
            self._entries[page] -= 1
            self._settle(page)

    def soil(self, pages: Iterable[int]) -> None:
        """They may hold what is not finite, which would spoil a row even beyond its length: they
        are zeroed before anybody else gets them."""
        self._soiled.update(pages)

    def _settle(self, page: int) -> None:
        if self._owner[page] is None and not self._entries[page]:
            if page in self._soiled:
                self._soiled.remove(page)
                self._draft.zeroed.append(page)
            self.twins.pop(page, None)
            heapq.heappush(self._free[self.group_of(page)], page)


class HostPages:
    """Pages in host memory: as many as whoever takes them has bytes for, numbered from 0."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._uses: dict[int, int] = {}
        self._free: list[int] = []
        self._resting: collections.deque[tuple[int, int]] = collections.deque()
        self._most = 0

    def __len__(self) -> int:
        return len(self._uses)

    def __contains__(self, page: int) -> bool:
        return page in self._uses

    def take(self) -> int:
        """A free page, in use once."""
        while self._resting and self._resting[0][0] <= self._draft.number:
            heapq.heappush(self._free, self._resting.popleft()[1])
        if not self._free:
            self._most += 1
        page = heapq.heappop(self._free) if self._free else self._most - 1
        self._uses[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more use."""
        self._uses[page] += 1

    def let_go(self, pages: Iterable[int]) -> None:
        """One use less of each."""
        for page in pages:
            self._uses[page] -= 1
            if not self._uses[page]:
                del self._uses[page]
                self._draft.drop_host(page)
                # The next turn gives it up, after it has moved pages out: not yet to this one.
                self._resting.append((self._draft.number + 2, page))
