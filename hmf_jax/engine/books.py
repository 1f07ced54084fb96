"""What the scheduler keeps: requests, limits, counts, and the turn that is being written."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Sequence
from typing import Any, Literal

from hmf_jax.engine.turn import Chunk, First, Load, Save, Turn

Mode = Literal["off", "exact", "fast"]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request as the scheduler sees it.

    Attributes:
      prompt: token ids.
      max_new_tokens: most new tokens; 0 only with `scored`.
      priority: the lowest number goes first.
      cuts: numbers of tokens of the prompt up to which other prompts are likely to be the same.
      namespace: what was read is shared only with requests of the same one.
      scored: the prompt's own log-probabilities are wanted, so all of it is read.
      constrained: the host says before each token which ones are allowed.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    priority: int = 0
    cuts: Sequence[int] = ()
    namespace: str = ""
    scored: bool = False
    constrained: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
    """What there is to be shared out.

    Attributes:
      slots: rows that can run at a time.
      pages, page_size: how many pages the pool has, and tokens of one.
      capacity: most tokens of a row, prompt and new tokens.
      chunk: most tokens of a prompt that are read in one turn; chunks lie on its multiples.
      page_bytes, snapshot_bytes: of one page in all layers, and of one snapshot.
      mode: which snapshots serve later prompts. "exact": those at multiples of `chunk`, so that
        what is read after them goes through the same programs; "fast": those at any place; "off":
        none. In every mode prompts that are equal and wait together are read once.
      device_bytes: most bytes of such snapshots on the device; their pages are those of the pool.
      host_bytes: most bytes of such snapshots and their pages in host memory.
      groups: slots and pages are shared out among so many parts of a mesh, in order; a row's pages
        lie in the part of its slot.
      spacing: fewest tokens between two snapshots of one prompt.
      every: a snapshot at each multiple of this, too; 0: not.
      interleave: most tokens that rows decode in a turn that reads a whole chunk; in proportion in
        one that reads less, but at least one: so rows neither wait long for a token, nor slots for
        their rows. 0: rows wait while prompts can be read.

    Raises ValueError for limits with which no request could run.
    """

    slots: int
    pages: int
    page_size: int
    capacity: int
    chunk: int
    page_bytes: int
    snapshot_bytes: int
    mode: Mode = "off"
    device_bytes: int = 0
    host_bytes: int = 0
    groups: int = 1
    spacing: int = 512
    every: int = 0
    interleave: int = 8

    def __post_init__(self) -> None:
        for name in ("slots", "pages", "page_size", "capacity", "chunk", "groups", "spacing"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        bytes = "page_bytes", "snapshot_bytes", "device_bytes", "host_bytes"
        for name in (*bytes, "every", "interleave"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more.")
        if self.mode not in ("off", "exact", "fast"):
            raise ValueError(f"mode={self.mode!r} must be 'off', 'exact' or 'fast'.")
        if self.every and self.mode == "exact" and self.every % self.chunk:
            raise ValueError(f"every={self.every} must be a multiple of chunk={self.chunk}.")
        if self.slots % self.groups or self.pages % self.groups:
            raise ValueError(
                f"slots={self.slots} and pages={self.pages} must be multiples of "
                f"groups={self.groups}."
            )
        if self.pages // self.groups < self.pages_of(self.capacity):
            raise ValueError(
                f"pages={self.pages} of {self.page_size} tokens in {self.groups} groups do not "
                f"hold one row of capacity={self.capacity}; {self.pages_of(self.capacity)} per "
                "group are needed."
            )

    def pages_of(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def group_of(self, slot: int) -> int:
        """The group of a slot."""
        return slot * self.groups // self.slots


def widths(chunk: int) -> tuple[int, ...]:
    """The sizes to which chunks are padded, ascending: few, since each is a compiled program."""
    sizes = [min(64, chunk)]
    while sizes[-1] < chunk:
        sizes.append(min(sizes[-1] * 4, chunk))
    return tuple(sizes)


@dataclasses.dataclass
class Stats:
    """Where everything is, and what has been counted since the start.

    Attributes:
      running, waiting, swapped: requests with a slot, without one, and moved to host memory.
      slots: by state, "free", "prefill", "decode".
      pages: by use, "free", "held" by rows, "cached" for prefixes only.
      prefix_bytes: by place and kind, ("device" or "host", "kv" or "snapshot").
      entries: beginnings of prompts that later ones can go on from, by place.
      evictions: entries that had to leave a place.
      queries, hits: tokens of prompts that were looked up, and that were found.
      missed: tokens that were not, by the reason, see `Started`.
      preemptions: rows that were moved to host memory.
      queued_tokens, prefill_tokens: of prompts that wait, and of those being read what is left.
    """

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    slots: dict[str, int] = dataclasses.field(default_factory=dict)
    pages: dict[str, int] = dataclasses.field(default_factory=dict)
    prefix_bytes: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    entries: dict[str, int] = dataclasses.field(default_factory=dict)
    evictions: dict[str, int] = dataclasses.field(default_factory=lambda: {"device": 0, "host": 0})
    queries: int = 0
    hits: int = 0
    missed: dict[str, int] = dataclasses.field(default_factory=dict)
    preemptions: int = 0
    queued_tokens: int = 0
    prefill_tokens: int = 0


class Row:
    """A request on its way: it waits, its prompt is read, it decodes; or it is swapped out."""

    def __init__(self, id: int, ask: Ask, number: int, since: float) -> None:
        self.id, self.ask, self.number, self.since = id, ask, number, since
        self.prompt = array("i", ask.prompt)
        # Prompts are equal if these are.
        digest = hashlib.blake2b(self.prompt.tobytes(), digest_size=16).digest()
        self.key = (ask.namespace, len(self.prompt), digest)
        self.state: Literal["waiting", "prefill", "decode", "swapped", "ended"] = "waiting"
        self.slot, self.started, self.cancelled = -1, False, False
        self.pages: list[int] = []
        self.lent: set[int] = set()  # pages of an entry, which it never writes
        self.wrote: set[int] = set()  # pages that it had written when it lost its slot
        self.done = 0  # tokens of the prompt that the slot holds
        self.cuts: list[int] = []  # where snapshots are still to be taken, ascending
        self.whole = False  # also one at the end of the prompt
        self.overtaken = False  # its next chunk comes before anybody else overtakes it
        self.made: list[int] = []  # new tokens that have been told
        self.coming = 0  # most tokens of turns that have not been committed yet
        self.snapshot, self.saved = -1, -1  # of a row that is swapped out, and in which turn
        self.away = False  # that snapshot is in host memory
        self.host: list[int] = []  # its pages there
        self.found: Any = None  # what `Prefixes.find` said, and of which version
        self.version = -1
        # A request that is being read, and how many tokens both begin with.
        self.shared: tuple[int, int] = -1, 0

    @property
    def order(self) -> tuple[int, bool, int]:
        """Lowest first: by priority, those that were swapped out, first come."""
        return self.ask.priority, self.state != "swapped", self.number

    @property
    def unread(self) -> int:
        return len(self.prompt) - self.done

    @property
    def ahead(self) -> int:
        """Most new tokens, those of turns under way included."""
        return len(self.made) + self.coming


class Draft:
    """The next turn while it is being written. What a turn uses can only be given up by the turn
    after it, since a turn begins with giving up: `later` collects that."""

    def __init__(self) -> None:
        self.number = 0
        self._snapshots = itertools.count()
        self._later: tuple[list[int], list[int]] = [], []
        self._begin()

    def _begin(self) -> None:
        self.ends: list[int] = []
        self.pages_out: list[tuple[int, int]] = []
        self.snapshots_out: list[int] = []
        self.dropped, self.dropped_host = self._later
        self.zeroed: list[int] = []
        self.saves: list[Save] = []
        self.snapshots_in: list[int] = []
        self.pages_in: list[tuple[int, int]] = []
        self.copies: list[tuple[int, int]] = []
        self.loads: list[Load] = []
        self.chunk: Chunk | None = None
        self.cuts: list[Save] = []
        self.firsts: list[First] = []
        self._later = [], []

    def snapshot(self) -> int:
        """A number that no snapshot has had."""
        return next(self._snapshots)

    def drop(self, snapshot: int, used: int) -> None:
        """Gives up a snapshot that was last used in the turn `used`."""
        (self._later[0] if used == self.number else self.dropped).append(snapshot)

    def drop_host(self, page: int) -> None:
        """Gives up a page in host memory, after this turn, which may still read it."""
        self._later[1].append(page)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, now or later."""
        return self._idle and not any(self._later)

    @property
    def _idle(self) -> bool:
        return self.chunk is None and not any(map(self.__getattribute__, _LISTS))

    def due(self) -> bool:
        """Whether there is something to do now. A turn that would do nothing else does not use
        anything, so what is to be given up after it can go at once."""
        if self._idle:
            (self.dropped, self.dropped_host), self._later = self._later, ([], [])
        return not self.empty

    def clear(self) -> None:
        """Forgets all that was to be done."""
        self._later = [], []
        self._begin()

    def close(self, tables: tuple[tuple[int, ...], ...], steps: int, waits: bool) -> Turn:
        """The turn; the next one begins."""
        parts: dict[str, Any] = {name: tuple(getattr(self, name)) for name in _LISTS}
        turn = Turn(self.number, chunk=self.chunk, **parts, tables=tables, steps=steps, waits=waits)
        self.number += 1
        self._begin()
        return turn


_LISTS = [name for name, value in vars(Draft()).items() if isinstance(value, list)]
