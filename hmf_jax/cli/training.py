"""`train` and `demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hmf_jax.cli.errors import talk
from hmf_jax.cli.options import DryRun, Fields, Overwrite, Quiet


def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file: model, data, output, a recipe (distill, long_context, instruct, "
            "reasoning) or a learning rate and its schedule, and more; see TrainConfig."
        ),
    ],
    fields: Fields = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on texts or chats. A run that was stopped goes on where it was."""
    from hmf_jax.engine import enable_compilation_cache
    from hmf_jax.training.plan import plan
    from hmf_jax.training.run import fine_tune
    from hmf_jax.training.schema import TrainConfig

    run = TrainConfig.load(config, fields or ())
    enable_compilation_cache()
    if dry_run:
        typer.echo(plan(run))
        return
    fine_tune(run, overwrite=overwrite, **talk(quiet))


def demo(
    model: Annotated[str, typer.Option(help="One of hmf_jax.embedded.HYBRIDS.")] = "gka",
    seed: Annotated[int, typer.Option(help="Of the facts to remember.")] = 0,
) -> None:
    """A tiny hybrid that was really trained remembers what it read. Needs no download."""
    from hmf_jax.demo import run_demo

    start = time.perf_counter()
    passed = run_demo(typer.echo, model, seed)
    typer.echo(f"Took {time.perf_counter() - start:.0f} s.")
    if not passed:
        raise typer.Exit(1)
