"""`bench`: the programs in the folder benchmarks/ of the repository."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import typer

PROGRAMS = {
    "serve": "A whole server, as its clients see it.",
    "serve-table": "Decoding with the memory full and time to first token, as a table.",
    "run": "Operators, models and training steps, one row per measurement.",
    "training": "Training steps of every choice of remat, beside a peer's, as a table.",
    "full-size": "A full-size checkpoint: loading, first token, memory.",
    "compare": "Two files of rows, or two commits.",
}


def program(name: str) -> Callable[[typer.Context], None]:
    """A command that leaves all its arguments to benchmarks/NAME.py."""
    module = name.replace("-", "_")

    def run(ctx: typer.Context) -> None:
        try:
            program = importlib.import_module(f"benchmarks.{module}")
        except ModuleNotFoundError as e:
            if not (e.name or "").startswith("benchmarks"):
                raise
            raise ValueError(
                "the benchmarks are not part of the installed package: get the repository and run "
                f"`python -m benchmarks.{module}` in it, or install it with `pip install -e .`"
            ) from None
        program.main(ctx.args)

    return run
