"""What a program chose and took: implementations of its operators, memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from hmf_jax.pallas_kernels import dispatch


@contextlib.contextmanager
def watch_dispatch() -> Iterator[dict[str, str]]:
    """Collect which implementation each operator traced inside chose, from dispatch's log."""
    ran: dict[str, str] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and len(record.args) == 3:
                ran[str(record.args[0])] = str(record.args[1])

    logger, handler = logging.getLogger("pallas_kernels"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with mock.patch.object(dispatch, "_said", set()):
            yield ran
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def peak_bytes() -> int | None:
    """Most bytes that the first device held so far; None where the backend does not count."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def program_bytes(program: Any) -> int:
    """Bytes of device memory that a compiled program takes: arguments, results, workspace."""
    m = program.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )
