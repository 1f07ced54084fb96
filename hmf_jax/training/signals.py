"""Signals that ask a run to stop: it finishes its step and saves."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """A signal stopped a training run after a step; the text says what is saved.

    Attributes:
      exit_code: of a command that ends for this reason: 128 + the number of the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], int | None]]:
    """A function that gives, once per step, the signal that asked for the end, or None.

    The second SIGTERM (SIGHUP) ends the process at once, the second SIGINT raises
    KeyboardInterrupt. Signals that the process was started to ignore (nohup) stay ignored. With
    several processes only SIGTERM counts, and all of them hear of it at the same step.
    """
    if jax.process_count() > 1:
        reached = multihost_utils.reached_preemption_sync_point
        yield lambda step: signal.SIGTERM if reached(step) else None
        return
    asked: list[int] = []

    def ask(signum: int, _: Any) -> None:
        asked.append(signum)
        for number in before:
            again = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, again)

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {}
    for number in numbers if main else ():
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda _: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
