"""The command line: `hmf-jax --help`. It reads arguments and prints; the library does the work.

No other part of the package prints. Commands import what they need when they run, so that `--help`
does not wait for JAX.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer

import hmf_jax
from hmf_jax.cli import bench, options
from hmf_jax.cli.bench_serve import bench_serve
from hmf_jax.cli.errors import Program, guarded, settings
from hmf_jax.cli.models import convert, info, verify
from hmf_jax.cli.prime import distill as prime_distill
from hmf_jax.cli.prime import init as prime_init
from hmf_jax.cli.prime import select as prime_select
from hmf_jax.cli.prime import unfuse as prime_unfuse
from hmf_jax.cli.serve import serve
from hmf_jax.cli.text import chat, generate
from hmf_jax.cli.training import demo, train
from hmf_jax.moved import moved

__all__ = [
    "app",
    "bench_serve",
    "chat",
    "convert",
    "demo",
    "generate",
    "info",
    "main",
    "prime_distill",
    "prime_init",
    "prime_select",
    "prime_unfuse",
    "serve",
    "train",
    "verify",
]

app = typer.Typer(
    cls=Program,
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

for _command in (generate, chat, serve, convert, verify, info, train, demo, bench_serve):
    app.command()(guarded(_command))
for _command in (prime_init, prime_distill, prime_unfuse, prime_select):
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
    # transformers, of which tokenizers are used, would import PyTorch if it is there: ten seconds.
    sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]
    app(prog_name="hmf-jax")


__getattr__ = moved(
    __name__,
    {name: f"is now hmf_jax.cli.options.{name}" for name in vars(options) if name[0].isupper()},
)
