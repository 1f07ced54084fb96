"""What every command needs: errors of one line, exit codes, and whether to show progress bars.

Exit codes: 0 it worked, 1 it did not, 2 it was called in a wrong way, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from hmf_jax.convert.reading import printable

settings = {"debug": False}


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on stderr and exit code 1."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            _flush()
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as e:  # of a training run: says what is saved
            if str(e):
                say(str(e))
            raise typer.Exit(getattr(e, "exit_code", 130)) from None
        except Exception as e:
            if settings["debug"]:
                raise
            if not _nobody_reads(e):
                expected = isinstance(e, (ValueError, OSError, ArithmeticError))
                what = str(e) if expected else f"{type(e).__name__}: {e}"
                say(what + ("" if expected else " (`hmf-jax --debug ...` shows where)"))
            raise typer.Exit(1) from None

    return guarded


class Program(TyperGroup):
    """The commands together: wrong usage and warnings are one line on stderr, too."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        _prepare()
        before, warnings.formatwarning = warnings.formatwarning, _warning
        try:
            sys.exit(self._run(*args, **options))
        finally:
            warnings.formatwarning = before

    def _run(self, *args: Any, **options: Any) -> int:
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except typer.Abort:
            say("aborted")
            return 1
        except Exception as e:
            if not hasattr(e, "format_message"):  # not one of click's
                raise
            if type(e).__name__ == "NoArgsIsHelpError":
                e.show()  # pyright: ignore[reportAttributeAccessIssue]
            else:
                command = getattr(getattr(e, "ctx", None), "command_path", "hmf-jax")
                say(f"{e.format_message().rstrip('.')} (see `{command} --help`)")  # pyright: ignore
            return getattr(e, "exit_code", 2)
        return code if isinstance(code, int) else 0


def say(text: str) -> None:
    """One line on stderr, whatever is in the text."""
    with contextlib.suppress(OSError):  # nobody reads that either
        typer.echo(_line(text), err=True)


def _line(text: str) -> str:
    return "hmf-jax: " + printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()), 4000)


def _warning(message: Any, *_: Any, **__: Any) -> str:
    return _line(f"warning: {message}") + "\n"


def progress() -> bool:
    """Progress bars are for people."""
    return sys.stderr is not None and sys.stderr.isatty()


def talk(quiet: bool) -> dict[str, Any]:
    """How a training run reports, as its arguments: a bar on a terminal, lines where there is
    none."""
    if quiet:
        return {"progress": False, "report": lambda text: None, "lines": False}
    bar, terminal = progress(), sys.stdout is not None and sys.stdout.isatty()
    return {"progress": bar, "report": typer.echo, "lines": not (bar and terminal)}


def _prepare() -> None:
    """Makes the process's streams and signals such that a command need not think of them."""
    for number in range(3):  # a closed one would become the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    streams: list[tuple[Any, str]] = [(sys.stdin, "replace"), (sys.stdout, "backslashreplace")]
    for stream, errors in streams:
        if hasattr(stream, "reconfigure"):  # text that the terminal's encoding does not have
            stream.reconfigure(errors=errors)
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, _: Any) -> None:
    signal.signal(signum, signal.SIG_DFL)  # the second one ends it at once
    os.write(2, b"hmf-jax: stopped by SIGTERM\n")
    sys.exit(128 + signum)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _nobody_reads(e: Exception) -> bool:
    """Whether the reader of standard output has gone (`| head`): there is nothing to say then.

    If it was standard output that failed, what is left in its buffer is dropped.
    """
    piped = sys.stdout is not None and not sys.stdout.isatty()
    try:
        _flush()
    except OSError:
        _drop()
    if isinstance(e, BrokenPipeError) and piped:
        _drop()
        return True
    return False


def _drop() -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
