"""`prime`: from a Transformer to a hybrid, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hmf_jax.cli.errors import progress, talk
from hmf_jax.cli.options import DryRun, DType, Dtype, Fields, Overwrite, Quiet
from hmf_jax.options import check_int


def init(
    base: Annotated[
        str | None, typer.Argument(help="Directory or repository of a Transformer.")
    ] = None,
    output: Annotated[Path | None, typer.Argument(help="Directory to write.")] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="One symbol per layer joined by '-': '*DA' stays attention, 'GKA*', 'GDN*', "
            "'M2*', 'BMF*' or 'SWA*' is to be distilled ('*' and 'GKA' etc. for no distillation)."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file in the original's format, for these arguments and the settings of the "
            "mixers (gka, gdn, mamba2, bmojo, swa). Arguments come before the file."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random parameters. Default: 0.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: bfloat16.")] = None,
    repeat: Annotated[
        str | None,
        typer.Option(
            help="How W_V is repeated for the gates: 'rows', as the original does (default), or "
            "'heads', in the order of the heads."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is already there.")
    ] = False,
) -> None:
    """Stage 0: build a hybrid whose new layers start from the attention they replace."""
    from hmf_jax.priming import prime_directory, read_stage0

    given = {
        "base": base,
        "output": output,
        "pattern": pattern,
        "seed": seed,
        "dtype": dtype and dtype.value,
        "repeat": repeat,
    }
    values = {} if config is None else read_stage0(config)
    values |= {name: value for name, value in given.items() if value is not None}
    if missing := [name for name in ("base", "output", "pattern") if name not in values]:
        raise ValueError(f"say what {' and '.join(missing)} is, as arguments or in --config.")
    prime_directory(**values, overwrite=overwrite, progress=progress(), report=typer.echo)


def distill(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file: model (a fused one), data, output, target (none, decoder, mixer, "
            "residuals, all), pre_lm_head, weighted, and what `hmf-jax train` reads; see "
            "DistillConfig."
        ),
    ],
    fields: Fields = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Stage 1: let the new layers learn what attention did. A stopped run goes on where it was."""
    from hmf_jax.engine import enable_compilation_cache
    from hmf_jax.priming import DistillConfig, distill

    run = DistillConfig.load(config, fields or ())
    enable_compilation_cache()
    distill(run, dry_run=dry_run, overwrite=overwrite, **talk(quiet and not dry_run))


def unfuse(
    directory: Annotated[Path, typer.Argument(help="A fused model.")],
    output: Annotated[
        Path | None, typer.Argument(help="Directory to write. Default: DIRECTORY_unfused.")
    ] = None,
    dtype: Dtype = DType.bfloat16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is already there.")
    ] = False,
) -> None:
    """Drop the teacher of a fused model: what is left is an ordinary hybrid."""
    from hmf_jax.priming import unfuse_directory

    options: Any = dict(dtype=dtype.value, overwrite=overwrite, progress=progress())
    unfuse_directory(directory, output, report=typer.echo, **options)


def select(
    scores: Annotated[
        Path,
        typer.Argument(help="CSV of scores per layer: header layer_num,TASK,...; -1: the base."),
    ],
    m: Annotated[int, typer.Option("--m", "-M", help="Layers to convert.")] = 14,
    exclude_layer_0: Annotated[
        bool, typer.Option("--exclude-layer-0", help="Never convert the first layer.")
    ] = False,
    task_filter: Annotated[
        str | None, typer.Option(help="Only tasks whose name contains this.")
    ] = None,
    kind: Annotated[str, typer.Option(help="Symbol of the new layers in the pattern.")] = "GKA",
    num_layers: Annotated[
        int | None, typer.Option(help="Layers of the model. Default: as many as the CSV has.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model to score first, layer by layer; missing rows are added to SCORES."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With --base: file of texts or chats to score on.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="With --data: tokens per row. Default: 8192.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="With --data: rows to score on. Default: 16.")
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(help="With --base: write a model per layer here, for other evaluations."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="With --base: window of the layer in question, tokens. Default: 2048."),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="With --data: number format. Default: bfloat16.")
    ] = None,
) -> None:
    """Choose the layers whose attention can go: those that do least harm when it is windowed."""
    from hmf_jax.config import HybridConfig
    from hmf_jax.engine import enable_compilation_cache
    from hmf_jax.loading import resolve
    from hmf_jax.priming import read_scores, select_layers, selection

    scoring, windowed = _scoring(
        base, data, variants, window, {"length": length, "rows": rows, "dtype": dtype}
    )
    selection.pattern([], 1, kind)  # says whether there is such a kind
    kinds = candidates = None
    if base is not None:
        model = HybridConfig.from_json(resolve(base, progress=progress()))
        kinds, layers = model.layer_kinds, model.num_hidden_layers
        candidates = selection.attention_layers(model)
        if num_layers not in (None, layers):
            raise ValueError(f"--num-layers {num_layers}, but the base has {layers} layers.")
        check_int("--m", m, 1, len(candidates) - (exclude_layer_0 and 0 in candidates))
        num_layers = layers
    if variants is not None:
        directory = resolve(str(base), progress=progress())
        written = selection.write_swa_variants(directory, variants, **windowed)
        typer.echo(f"{len(written)} variants in {variants}, with links to {directory}.")
        if data is None:
            return
    if data is not None:
        enable_compilation_cache()
        selection.score_directory(
            str(base),
            data,
            scores,
            progress=progress(),
            report=typer.echo,
            **scoring,
            **windowed,
        )
    found = read_scores(scores)
    chosen = select_layers(
        found,
        m,
        num_layers=num_layers,
        layers=candidates,
        exclude_layer_0=exclude_layer_0,
        task_filter=task_filter,
    )
    typer.echo(selection.describe(chosen, num_layers or max(found.rows) + 1, kind, kinds))


def _scoring(
    base: str | None,
    data: str | None,
    variants: Path | None,
    window: int | None,
    options: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was said about scoring, and about the window of the layer in question, by name.

    Raises ValueError for what would have no effect.
    """
    if (data is not None or variants is not None) and base is None:
        raise ValueError("--data and --variants need the model: --base.")
    if base is not None and data is None and variants is None:
        raise ValueError("--base needs --data to score it on, or --variants to write.")
    scoring = {name: getattr(x, "value", x) for name, x in options.items() if x is not None}
    windowed = {} if window is None else {"window": check_int("--window", window, 1)}
    if (scoring and data is None) or (windowed and base is None):
        raise ValueError(f"--{next(iter(scoring), 'window')} is for scoring: it needs --data.")
    return scoring, windowed
