"""What the scheduler tells the device to do in one go, what comes of it, and what requests hear.

A turn is made of numbers only: it can be printed, compared, written to a file and replayed. Its
parts happen in the order in which they are listed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

REASONS = ("", "eos", "length", "capacity", "stop", "error")  # by the device's number; 0: not ended


class Save(NamedTuple):
    """A copy of everything that a slot holds outside of pages becomes a snapshot.

    `logits`: also of the logits that its next token is chosen from.
    """

    slot: int
    snapshot: int
    logits: bool = False


class Load(NamedTuple):
    """A slot takes over a snapshot, which stays; the request `id` goes on from there.

    `length` is the number of tokens that the snapshot holds. `resume`: it was the request's own
    row, with its newest token and its books; otherwise these begin anew.
    """

    slot: int
    snapshot: int
    id: int
    length: int
    resume: bool = False


class Chunk(NamedTuple):
    """The next `count` tokens of a request's prompt, from the index `start` on, are read.

    Padded to `width` tokens. `pages` hold the row, token i in pages[i // page_size]. `start` 0
    empties the slot first. `last`: the prompt ends here.
    """

    id: int
    slot: int
    start: int
    count: int
    width: int
    pages: tuple[int, ...]
    last: bool


class First(NamedTuple):
    """The token after a prompt is chosen, of a slot whose prompt has been read."""

    id: int
    slot: int


class Turn(NamedTuple):
    """One go of the device.

    Attributes:
      number: counts turns from 0.
      ends: slots whose rows stop: of requests that were ended from outside, and of rows that are
        swapped out (`saves` has their snapshots; a `Load` with `resume` lets them run again).
      pages_out, snapshots_out: (device, host) and snapshots whose contents move to host memory.
      dropped, dropped_host: snapshots, and pages in host memory, that are given up.
      zeroed: pages to be filled with zeros, after a row that was not finite.
      saves: before anything below overwrites a slot: rows that are swapped out, or have ended.
      snapshots_in, pages_in: the way back, (host, device).
      copies: pages (source, target) that are copied.
      loads: slots that take over a snapshot.
      chunk: a piece of one prompt, or None.
      cuts: snapshots after that chunk, of its slot.
      firsts: slots that choose their first token.
      tables: the pages of every slot, (): nothing.
      steps: tokens that the running rows decode, at most; 0: none.
      waits: this turn has to be collected before the next one is planned.
    """

    number: int
    ends: tuple[int, ...] = ()
    pages_out: tuple[tuple[int, int], ...] = ()
    snapshots_out: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    dropped_host: tuple[int, ...] = ()
    zeroed: tuple[int, ...] = ()
    saves: tuple[Save, ...] = ()
    snapshots_in: tuple[int, ...] = ()
    pages_in: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    loads: tuple[Load, ...] = ()
    chunk: Chunk | None = None
    cuts: tuple[Save, ...] = ()
    firsts: tuple[First, ...] = ()
    tables: tuple[tuple[int, ...], ...] = ()
    steps: int = 0
    waits: bool = False


class Result(NamedTuple):
    """What a turn produced.

    Attributes:
      tokens: new tokens of each slot, those of `firsts` included.
      logprobs: of each token.
      reasons: why the row of each slot has ended: an index of `REASONS`.
      top: the most likely tokens at the place of each token, where they were asked for.
      scores: log-probabilities of the chunk's tokens after the first one of the prompt, if its
        request asked for them; top_scores: the most likely tokens there.
    """

    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    reasons: Sequence[int]
    top: Sequence[Sequence[dict[int, float]]] = ()
    scores: Sequence[float] = ()
    top_scores: Sequence[dict[int, float]] = ()


@dataclasses.dataclass(frozen=True)
class Started:
    """A request has got its row, after this many seconds in the queue.

    `cached`: tokens of its prompt that need not be read, since a snapshot has them. `missed`: why
    there are no more: "none" (nobody has read this beginning), "no_snapshot" (somebody has, but
    there was no snapshot), "evicted", "namespace" (read with other settings), "short" (too short to
    be kept), "" (everything was there).
    """

    id: int
    waited: float
    cached: int = 0
    missed: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities of the next tokens of a prompt, the first token's excepted; and the most
    likely tokens there, if they were asked for."""

    id: int
    logprobs: list[float]
    top: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class New:
    """New tokens of a request, the log-probability of each, and, if it asked for them, the most
    likely tokens at each place, {token: logprob}."""

    id: int
    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A request has ended: "eos", "length", "capacity", "stop" or "error".

    With "error" the logits of its row were not finite: `error` says at which new token, and where
    that began.
    """

    id: int
    reason: str
    error: str | None = None


Event = Started | Scored | New | Finished
