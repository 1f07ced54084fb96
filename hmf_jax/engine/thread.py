"""An engine in a thread of its own, which alone touches the device; any thread may give it work."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hmf_jax.engine.engine import Engine
from hmf_jax.engine.request import Request
from hmf_jax.engine.turn import Event, Finished

IDLE = 0.5  # seconds between signs of life of a thread that has nothing to do
FEW = 3  # with fewer requests than these, tokens are told one by one: little is lost by it
FAILURES, WITHIN = 3, 60.0  # so many failures in so many seconds: it is no use to go on


class EngineThread:
    """Runs an engine for other threads.

        thread = EngineThread(engine, deliver)
        thread.start()
        id = thread.submit(request)      # checked here, in the caller's thread
        thread.cancel(id)
        thread.stop()

    Args:
      engine: nobody else may use it until `stop` has returned.
      deliver: gets what has happened, once per turn for all requests, in the engine's thread; it
        must not wait. Every request that `submit` has returned ends with exactly one `Finished`.
      steps: tokens that a row decodes per turn, at most; 1 while there are few requests.

    If a turn raises an exception, all requests that wait or run end with it and the engine starts
    over; after three of them in a minute, or one of the GPU, the thread ends.

    Attributes:
      beat: `time.monotonic()` of the last sign of life.
      error: what has ended the thread, if an exception did; `submit` then raises RuntimeError.
    """

    def __init__(
        self, engine: Engine, deliver: Callable[[list[Event]], None], *, steps: int = 8
    ) -> None:
        self.engine, self._deliver, self._steps = engine, deliver, steps
        self._inbox: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # nothing is put into the inbox after the thread's last look
        self._stopping, self._ended = False, False
        self._known: set[int] = set()  # requests that have not ended
        self._failed: list[float] = []  # when turns have raised exceptions
        self.beat = time.monotonic()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begins; until then everything waits."""
        self._thread.start()

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id, which its events carry.

        Raises:
          ValueError: what `Engine.check` finds wrong.
          RuntimeError: the thread has stopped.
        """
        request = self.engine.check(request)
        id = self.engine.new_id()
        self._put(lambda: self._add(request, id))
        return id

    def cancel(self, id: int) -> None:
        """Ends a request wherever it is; its next event is `Finished(id, "stop")`."""
        self._post(lambda: self.engine.abort(id) if id in self._known else None)

    def call(self, function: Callable[[Engine], Any]) -> Future[Any]:
        """Runs a function of the engine between two turns; the future has what it returns.

        Raises RuntimeError: the thread has stopped.
        """
        future: Future[Any] = Future()

        def do() -> None:
            try:
                future.set_result(function(self.engine))
            except Exception as e:
                future.set_exception(e)

        self._put(do)
        return future

    def stop(self, timeout: float | None = None) -> bool:
        """Ends everything that runs and waits, then the thread; whether it has ended in time."""

        def end() -> None:
            self._stopping = True

        self._post(end)
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._ended

    def _put(self, item: Callable[[], Any]) -> None:
        with self._lock:
            if self._ended:
                why = "" if self.error is None else f": {self.error!r}"
                raise RuntimeError(f"The engine has stopped{why}.")
            self._inbox.put(item)

    def _post(self, item: Callable[[], Any]) -> None:
        """`_put` of what has no effect on a thread that has ended."""
        with self._lock:
            if not self._ended:
                self._inbox.put(item)

    def _add(self, request: Request, id: int) -> None:
        self._known.add(id)
        self.engine.add(request, id)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._work(wait=not self.engine.busy)
                self.beat = time.monotonic()
                if self.engine.busy and not self._stopping:
                    self._tell(self._step())
        except BaseException as e:
            self.error = e
        self._end()

    def _step(self) -> list[Event]:
        try:
            return self.engine.step(1 if len(self._known) < FEW else self._steps)
        except Exception as e:
            now = time.monotonic()
            self._failed = [*(at for at in self._failed if now - at < WITHIN), now]
            if len(self._failed) >= FAILURES or "CUDA" in str(e):
                raise
            return self.engine.recover()

    def _work(self, wait: bool) -> None:
        """Does what is in the inbox; if told to, waits a while for something."""
        try:
            item = self._inbox.get(wait, IDLE)
            while True:
                item()
                item = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _tell(self, events: list[Event]) -> None:
        self._known -= {event.id for event in events if isinstance(event, Finished)}
        if events:
            self._deliver(events)

    def _end(self) -> None:
        """Nothing comes after this: requests that have not ended do."""
        with self._lock:
            self._ended = True
        self._work(wait=False)
        reason, error = ("stop", None) if self.error is None else ("error", repr(self.error))
        self._tell([Finished(id, reason, error) for id in sorted(self._known)])
