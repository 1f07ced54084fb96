"""Several engines behind one door, each with devices and parameters of its own (data parallel).

A request goes where most of its prompt has been read before, unless that engine has much more to
do than others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from hmf_jax.engine.request import Request
from hmf_jax.engine.turn import Event, Finished

BLOCK = 256  # tokens by which prompts are compared
REMEMBERED = 1 << 16  # blocks: 16 million tokens
IMBALANCE = 1.5  # times the load of the least loaded engine ...
SLACK = 2  # ... and so many requests more, or one that runs alone would drive its next turn away


class Runner(Protocol):
    """What is used of `hmf_jax.engine.EngineThread`, which see."""

    engine: Any
    beat: float
    error: BaseException | None

    @property
    def alive(self) -> bool: ...
    def start(self) -> None: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, id: int) -> None: ...
    def call(self, function: Callable[[Any], Any]) -> Future[Any]: ...
    def stop(self, timeout: float | None = None) -> bool: ...


class Router:
    """Engines in threads of their own, used like one `EngineThread`. Any thread may use it.

    If one engine dies, all of them end: the process is to be started anew.

    Args:
      engines: makes the thread of each engine, given the function that it delivers events to.
      deliver: gets the events of all engines, in the thread of the one they come from.
    """

    def __init__(
        self,
        engines: Sequence[Callable[[Callable[[list[Event]], None]], Runner]],
        deliver: Callable[[list[Event]], None],
    ) -> None:
        self._deliver = deliver
        self._lock = threading.Lock()
        self._running = [0] * len(engines)  # requests of each engine that have not ended
        self._readers: OrderedDict[bytes, int] = OrderedDict()  # block -> engines, as bits
        self.threads = [make(self._from(i)) for i, make in enumerate(engines)]

    def start(self) -> None:
        """Starts all threads."""
        for thread in self.threads:
            thread.start()

    def submit(self, request: Request) -> int:
        """Queues a request at one of the engines; see `EngineThread.submit`."""
        blocks = _blocks(request)
        with self._lock:
            chosen = self._choose(blocks)
            self._running[chosen] += 1
            self._remember(blocks, chosen)
        try:
            id = self.threads[chosen].submit(request)
        except BaseException:
            with self._lock:
                self._running[chosen] -= 1
            raise
        return id * len(self.threads) + chosen

    def cancel(self, id: int) -> None:
        """Ends a request wherever it is."""
        id, place = divmod(id, len(self.threads))
        self.threads[place].cancel(id)

    def call(self, function: Callable[[Any], Any]) -> list[Future[Any]]:
        """Runs a function of every engine between two turns of it."""
        return [thread.call(function) for thread in self.threads]

    def stop(self, timeout: float | None = None) -> bool:
        """Ends everything that runs and waits, then the threads; whether all have ended in time."""
        return all([thread.stop(timeout) for thread in self.threads])

    @property
    def alive(self) -> bool:
        """Whether all engines take requests."""
        return all(thread.alive for thread in self.threads)

    @property
    def beat(self) -> float:
        """When the engine that has been silent longest gave a sign of life, `time.monotonic()`."""
        return min(thread.beat for thread in self.threads)

    @property
    def error(self) -> BaseException | None:
        """What has ended an engine, if an exception did."""
        return next((t.error for t in self.threads if t.error is not None), None)

    @property
    def loads(self) -> list[int]:
        """Requests of each engine that have not ended."""
        with self._lock:
            return list(self._running)

    def forget(self) -> None:
        """The engines' prefix caches have been emptied."""
        with self._lock:
            self._readers.clear()

    def _choose(self, blocks: Sequence[bytes]) -> int:
        """The engine for a prompt of these blocks."""
        loads = self._running
        least = min(loads)
        readers = -1  # of all blocks so far
        found = 0
        for block in blocks:
            readers &= self._readers.get(block, 0)
            if not readers:
                break
            found = readers
        fit = [i for i, n in enumerate(loads) if n <= IMBALANCE * least + SLACK and found >> i & 1]
        return min(fit or range(len(loads)), key=loads.__getitem__)

    def _remember(self, blocks: Sequence[bytes], engine: int) -> None:
        for block in blocks:
            self._readers[block] = self._readers.get(block, 0) | 1 << engine
            self._readers.move_to_end(block)
        while len(self._readers) > REMEMBERED:
            self._readers.popitem(last=False)

    def _from(self, engine: int) -> Callable[[list[Event]], None]:
        """Hands on the events of an engine, under the ids that `submit` has returned."""

        def deliver(events: list[Event]) -> None:
            ended = sum(isinstance(event, Finished) for event in events)
            with self._lock:
                self._running[engine] -= ended
            count = len(self.threads)
            self._deliver([dataclasses.replace(e, id=e.id * count + engine) for e in events])

        return deliver


def _blocks(request: Request) -> list[bytes]:
    """A digest of every beginning of the prompt that is a multiple of `BLOCK` tokens long."""
    digests: list[bytes] = []
    so_far = hashlib.blake2b(f"{request.num_iter} {request.namespace}".encode(), digest_size=16)
    prompt = np.asarray(request.prompt, np.int32)
    for end in range(BLOCK, len(prompt) + 1, BLOCK):
        so_far.update(prompt[end - BLOCK : end].tobytes())
        digests.append(so_far.digest())
    return digests
