"""`convert`, `verify` and `info`: model directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hmf_jax.cli.errors import progress
from hmf_jax.cli.options import DType, Dtype, Format


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Directory of the model (Hugging Face or Orbax format), a Hugging Face repository "
            "such as org/name, or a GGUF file of a Llama, Qwen2 or Qwen3 model."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    to: Annotated[
        Format | None, typer.Option(help="Format to write. Default: the one SOURCE is not.")
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Of a GGUF file: the format its numbers become. Default: bfloat16."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest weight file in Hugging Face format. Default: 5GB.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is already there.")
    ] = False,
    for_original: Annotated[
        bool,
        typer.Option(
            "--for-original/--not-for-original",
            help="Refuse layers that the original does not have in the model's family.",
        ),
    ] = True,
) -> None:
    """Convert a model from Hugging Face to Orbax format, or back. Numbers stay bit-identical.

    Of a GGUF file, quantised or not, it makes a model in Hugging Face format.
    """
    from hmf_jax.loading import convert_directory, is_gguf, resolve

    if max_shard_size is not None and not is_gguf(source):
        stored = to is None and any(resolve(source, progress=progress()).glob("*.safetensors"))
        if stored or to is Format.orbax:
            raise ValueError("--max-shard-size is for Hugging Face format, this writes Orbax.")
    written = convert_directory(
        source,
        target,
        to=None if to is None else to.value,
        dtype=None if dtype is None else dtype.value,
        max_shard_size="5GB" if max_shard_size is None else max_shard_size,
        overwrite=overwrite,
        for_original=for_original,
        progress=progress(),
    )
    typer.echo(f"Wrote {target} in {written} format.")


def verify(
    directory: Annotated[
        list[Path],
        typer.Argument(
            help="Holds a model (config.json, model*.safetensors) and recorded outputs of the "
            "original (expected.safetensors, case.json)."
        ),
    ],
    dtype: Dtype = DType.float32,
    rtol: Annotated[
        float | None, typer.Option(help="Largest relative error in float32. Default: 1e-4.")
    ] = None,
) -> None:
    """Compare a model with recorded outputs of the original, one line per tensor.

    Exit code 0 only if every tensor agrees.
    """
    from hmf_jax.loading import from_pretrained
    from hmf_jax.options import check_number
    from hmf_jax.priming import loss_and_gradients
    from hmf_jax.verify import RTOL, verify_dir

    if rtol is not None:
        check_number("--rtol", rtol, 0, 1)
        if dtype is not DType.float32:
            raise ValueError("--rtol is for float32; other formats have limits of their own.")

    def load(path: Path, dtype: Any) -> Any:
        return from_pretrained(path, dtype=dtype, progress=False)

    options: Any = dict(distillation=loss_and_gradients, dtype=dtype.value)
    options["rtol"] = RTOL if rtol is None else rtol
    ok = True
    for path in directory:
        report = verify_dir(path, load, **options)
        typer.echo(str(report))
        ok = ok and report.ok
    if not ok:
        raise typer.Exit(1)


def info(
    model: Annotated[
        str,
        typer.Argument(
            help="Directory of a model, a config.json (no weights needed), or one of the built-in "
            "shapes: tiny, 8b, 32b, llama-3.1-8b, ..."
        ),
    ],
    mixer: Annotated[
        str | None,
        typer.Option(help="For built-in shapes: what replaces half of the attention layers."),
    ] = None,
) -> None:
    """Show layers, parameters and the memory of one sequence per context length."""
    from hmf_jax.config import HybridConfig
    from hmf_jax.loading import is_gguf, resolve
    from hmf_jax.memory import describe, memory_table
    from hmf_jax.presets import PRESETS

    if is_gguf(model):
        resolve(model)  # says what to do
    if mixer is None and Path(model).exists():
        config = HybridConfig.from_json(model)
    elif model in PRESETS:
        config = HybridConfig.preset(model, mixer)
    elif mixer is not None:
        raise ValueError(f"--mixer is for the built-in shapes only: {', '.join(PRESETS)}.")
    else:  # says what is missing
        config = HybridConfig.from_json(model)
    typer.echo(describe(config))
    typer.echo("\nMemory of one sequence in bfloat16 (recurrent states in float32):")
    typer.echo(memory_table(config))
