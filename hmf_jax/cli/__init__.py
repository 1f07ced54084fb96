"""The command line: `hmf-jax --help`. It reads arguments and prints; the library does the work.

No other part of the package prints. Commands import what they need when they run, so that `--help`
does not wait for JAX.
"""

from __future__ import annotations

import os
from typing import Annotated

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer

import hmf_jax
from hmf_jax.cli import bench, models, prime, text, training
from hmf_jax.cli.errors import guarded, settings

__all__ = ["app", "main"]

app = typer.Typer(
    help="Run hybrid language models (attention mixed with Gated KalmaNet, Gated DeltaNet, "
    "Mamba-2 or B'MOJO-F layers). New here? Try `hmf-jax demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_prime = typer.Typer(
    help="Make a hybrid from a Transformer: choose layers, build it, distil it, unfuse it.",
    no_args_is_help=True,
)
_bench = typer.Typer(
    help="Measure speed and memory; needs the repository, not only the installed package.",
    no_args_is_help=True,
)
app.add_typer(_prime, name="prime")
app.add_typer(_bench, name="bench")

for _command in (
    text.generate,
    text.chat,
    models.convert,
    models.verify,
    models.info,
    training.train,
    training.demo,
):
    app.command()(guarded(_command))
for _command in (prime.init, prime.distill, prime.unfuse, prime.select):
    _prime.command()(guarded(_command))
for _name, _help in bench.PROGRAMS.items():
    # Everything behind the name is for the program, its --help too.
    _bench.command(
        _name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(guarded(bench.program(_name)))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hmf-jax {hmf_jax.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    settings["debug"] = debug


def main() -> None:
    """Entry point of `hmf-jax`."""
    app(prog_name="hmf-jax")
