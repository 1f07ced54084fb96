"""What every command needs: errors of one line, and whether to show progress bars."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

settings = {"debug": False}


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on stderr and exit code 1."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as e:  # of a training run: says what is saved
            if str(e):
                typer.echo(f"hmf-jax: {e}", err=True)
            raise typer.Exit(getattr(e, "exit_code", 130)) from None
        except Exception as e:
            if settings["debug"]:
                raise
            expected = isinstance(e, (ValueError, OSError, ArithmeticError))
            what = str(e) if expected else f"{type(e).__name__}: {e}"
            hint = "" if expected else " (`hmf-jax --debug ...` shows where)"
            typer.echo(f"hmf-jax: {what}{hint}", err=True)
            raise typer.Exit(1) from None

    return guarded


def progress() -> bool:
    """Progress bars are for people."""
    return sys.stderr.isatty()


def talk(quiet: bool) -> dict[str, Any]:
    """How a training run reports, as its arguments: a bar on a terminal, lines where there is
    none."""
    if quiet:
        return {"progress": False, "report": lambda text: None, "lines": False}
    bar = progress()
    return {"progress": bar, "report": typer.echo, "lines": not (bar and sys.stdout.isatty())}
