"""How long turns take, and how long the device waits for the host between two of them."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import NamedTuple

from hmf_jax.engine.turn import Turn

MOST = 4096  # turns that are remembered until somebody asks


class Timing(NamedTuple):
    """One turn.

    `kind`: "prefill", "decode", "mixed" (both) or "copy" (neither). `seconds`: from the end of the
    turn before, or from when it was handed to the device, to its result. `gap`: seconds that the
    device had nothing to do before it, at most: it is seen only when the host looks.
    """

    kind: str
    seconds: float
    gap: float


class Timings:
    """Takes the times of turns, which end in the order in which they were handed to the device."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun: collections.deque[tuple[float, float]] = collections.deque()  # when; gap
        self._ended: float | None = None  # the turn before, unless there was nothing to do since
        self._told: collections.deque[Timing] = collections.deque(maxlen=MOST)

    def enqueued(self, idle: bool) -> None:
        """A turn was handed to the device, which had done everything before if it was `idle`."""
        now = self._clock()
        self._begun.append((now, now - self._ended if idle and self._ended is not None else 0.0))

    def collected(self, turn: Turn) -> None:
        """The result of the oldest of these turns is there."""
        now, (begun, gap) = self._clock(), self._begun.popleft()
        since = begun if self._ended is None else max(begun, self._ended)
        read, written = turn.chunk is not None, turn.steps > 0 or bool(turn.firsts)
        kind = "mixed" if read and written else "prefill" if read else "decode"
        self._told.append(Timing(kind if read or written else "copy", now - since, gap))
        self._ended = now

    def rest(self) -> None:
        """There is nothing to do."""
        self._ended = None

    def take(self) -> list[Timing]:
        """What was not taken yet, at most the newest 4096 turns."""
        told = []
        while self._told:  # any thread may ask while turns are added
            told.append(self._told.popleft())
        return told
