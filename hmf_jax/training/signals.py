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
def stopping_at_once(saved: Callable[[], str]) -> Iterator[None]:
    """Signals raise `Stopped` wherever the program is; `saved` says what a run can go on from.

    For what comes before and after the steps of a run, which `stop_signals` takes care of. With
    several processes, SIGTERM is left to JAX, which tells all of them of it.
    """
    if jax.process_count() > 1:
        yield
        return

    def stop(signum: int, _: Any) -> None:
        name = signal.Signals(signum).name
        raise Stopped(f"Stopped by {name}; {saved()}", signum)

    with _handled(stop):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[list[int]]:
    """Gives signals to this handler, those that the process was not started to ignore."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield list(before)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


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
        for number in handled:
            again = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, again)

    with _handled(ask) as handled:
        yield lambda _: asked[0] if asked else None
