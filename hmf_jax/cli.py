"""The command line: `hmf-jax --help`. The only part of the package that prints."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer

app = typer.Typer(
    help="Run hybrid language models (attention mixed with Gated KalmaNet, Gated DeltaNet, "
    "Mamba-2 or B'MOJO-F layers). New here? Try `hmf-jax demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_settings = {"debug": False}


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error.")
    ] = False,
) -> None:
    _settings["debug"] = debug


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors are one line on stderr and exit code 1."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as e:
            if _settings["debug"]:
                raise
            expected = isinstance(e, (ValueError, OSError))
            what = str(e) if expected else f"{type(e).__name__}: {e}"
            hint = "" if expected else " (`hmf-jax --debug ...` shows where)"
            typer.echo(f"hmf-jax: {what}{hint}", err=True)
            raise typer.Exit(1) from None

    app.command()(guarded)
    return guarded


class DType(enum.StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class Format(enum.StrEnum):
    orbax = "orbax"
    hf = "hf"


Model = Annotated[
    str,
    typer.Argument(
        help="Directory of the model (Hugging Face or Orbax format), or a Hugging Face repository "
        "such as org/name, which is downloaded."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Randomness: 0 always takes the most likely token, 1 follows the model's "
        "probabilities. Default: what the model's generation_config.json recommends, else 0."
    ),
]
TopK = Annotated[int | None, typer.Option(help="Choose among the K most likely tokens. 0: all.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Choose among the most likely tokens that make up this probability. 1: all."),
]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens less likely than this times the best one. 0: off.")
]
Penalty = Annotated[
    float | None, typer.Option(help="Above 1: avoid tokens that already occurred. 1: off.")
]
Seed = Annotated[int, typer.Option(help="Same seed, same text.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer before this text. May be repeated.")
]
NumIter = Annotated[
    int | None,
    typer.Option(help="Solver iterations of GKA layers: fewer is faster, 0 is linear attention."),
]
Capacity = Annotated[
    int | None,
    typer.Option(help="Most tokens to keep in memory, prompt and answer. Default: as needed."),
]
Dtype = Annotated[DType, typer.Option(help="Number format of weights and activations.")]
TP = Annotated[int, typer.Option(help="Devices to split the model over (tensor parallel).")]


@_command
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(help="Text to continue; several make a batch.")],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: Stop = None,
    num_iter: NumIter = None,
    capacity: Capacity = None,
    dtype: Dtype = DType.bfloat16,
    tp: TP = 1,
) -> None:
    """Continue one or more texts (plain continuation; see `chat` for conversations)."""
    from hmf_jax.chat import generate_text, stream_text

    loaded, sampling = _load(
        model,
        dtype,
        tp,
        num_iter,
        seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    options: dict[str, Any] = dict(
        stop=stop or (),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        num_iter=num_iter,
        capacity=capacity,
    )
    if len(prompt) == 1:
        pieces = stream_text(loaded, prompt[0], **options)
        typer.echo(prompt[0], nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
        return
    for text, reply in zip(prompt, generate_text(loaded, prompt, **options), strict=True):
        typer.echo(f"{text}{reply.text}\n---")


@_command
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="Instruction that opens the chat.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Let a reasoning model think first, or not. Default: the model's own.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    stop: Stop = None,
    num_iter: NumIter = None,
    capacity: Capacity = None,
    dtype: Dtype = DType.bfloat16,
    tp: TP = 1,
) -> None:
    """Talk to a model. /reset forgets the conversation, /exit or Ctrl-D ends it."""
    from hmf_jax.chat import ChatSession

    loaded, sampling = _load(
        model,
        dtype,
        tp,
        num_iter,
        seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    session = ChatSession(
        loaded,
        system=system,
        thinking=thinking,
        num_iter=num_iter,
        sampling=sampling,
        stop=stop or (),
        max_new_tokens=max_new_tokens,
        capacity=capacity,
    )
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            typer.echo()
            return
        if text == "/exit":
            return
        if text == "/reset":
            session.reset()
        elif text:
            try:
                for piece in session.stream(text):
                    typer.echo(piece, nl=False)
            except KeyboardInterrupt:  # ends the reply, not the chat
                pass
            typer.echo()


@_command
def convert(
    source: Model,
    target: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    to: Annotated[
        Format | None, typer.Option(help="Format to write. Default: the one SOURCE is not.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file in Hugging Face format.")
    ] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is already there.")
    ] = False,
) -> None:
    """Convert a model from Hugging Face to Orbax format, or back. Numbers stay bit-identical."""
    from hmf_jax.loading import from_pretrained, resolve, save_orbax, save_pretrained

    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another directory or pass --overwrite.")
    progress = _progress()
    directory = resolve(source, progress=progress)
    if to is None:
        to = Format.orbax if any(directory.glob("*.safetensors")) else Format.hf
    model = from_pretrained(directory, dtype=None, progress=progress)
    if to is Format.orbax:
        save_orbax(model, target, overwrite=overwrite)
    else:
        save_pretrained(
            model, target, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    typer.echo(f"Wrote {target} in {to.value} format.")


@_command
def verify(
    directory: Annotated[
        list[Path],
        typer.Argument(
            help="Holds a model (config.json, model*.safetensors) and recorded outputs of the "
            "original (expected.safetensors, case.json)."
        ),
    ],
    dtype: Dtype = DType.float32,
    rtol: Annotated[float, typer.Option(help="Largest relative error in float32.")] = 1e-4,
) -> None:
    """Compare a model with recorded outputs of the original, one line per tensor.

    Exit code 0 only if every tensor agrees.
    """
    from convert.verify import verify_dir
    from hmf_jax.loading import from_pretrained

    def load(path: Path, dtype: Any) -> Any:
        return from_pretrained(path, dtype=dtype, progress=False)

    ok = True
    for path in directory:
        report = verify_dir(path, load, dtype=dtype.value, rtol=rtol)
        typer.echo(str(report))
        ok = ok and report.ok
    if not ok:
        raise typer.Exit(1)


@_command
def info(
    model: Annotated[
        str,
        typer.Argument(
            help="Directory of a model, a config.json (no weights needed), or one of the built-in "
            "shapes tiny, 8b, 32b."
        ),
    ],
    mixer: Annotated[
        str | None,
        typer.Option(help="For built-in shapes: what replaces half of the attention layers."),
    ] = None,
) -> None:
    """Show layers, parameters and the memory of one sequence per context length."""
    from hmf_jax.config import HybridConfig
    from hmf_jax.memory import describe, memory_table

    if model in ("tiny", "8b", "32b") and not Path(model).exists():
        config = HybridConfig.preset(model, mixer)
    elif mixer is not None:
        raise ValueError("--mixer is for the built-in shapes tiny, 8b and 32b only.")
    else:
        config = HybridConfig.from_json(model)
    typer.echo(describe(config))
    typer.echo("\nMemory of one sequence in bfloat16 (recurrent states in float32):")
    typer.echo(memory_table(config))


@_command
def demo(
    directory: Annotated[
        Path | None, typer.Option(help="Keep the files here. Default: a temporary directory.")
    ] = None,
) -> None:
    """Build a tiny hybrid model, convert it, verify it, generate with it. Needs no download."""
    from hmf_jax.demo import run_demo

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        passed = run_demo(directory or temporary, typer.echo)
    typer.echo(f"Took {time.perf_counter() - start:.0f} s.")
    if not passed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of `hmf-jax`."""
    app()


def _load(
    name: str, dtype: DType, tp: int, num_iter: int | None, seed: int, **sampling: Any
) -> tuple[Any, Any]:
    """The model, and its recommended sampling with what the command line gives in its place.

    Everything that can be wrong is looked at before the weights are loaded.
    """
    import jax

    from hmf_jax.chat import default_sampling
    from hmf_jax.generation import enable_compilation_cache
    from hmf_jax.loading import from_pretrained, resolve
    from hmf_jax.sharding import make_mesh

    if tp > jax.device_count():
        raise ValueError(f"--tp {tp} needs {tp} devices, but there are {jax.device_count()}.")
    if num_iter is not None and num_iter < 0:
        raise ValueError(f"num_iter={num_iter} must be 0 or more.")
    directory = resolve(name, progress=_progress())
    given = {key: value for key, value in sampling.items() if value is not None}
    params = dataclasses.replace(default_sampling(directory), seed=seed, **given)
    enable_compilation_cache()
    mesh = None if tp == 1 else make_mesh(tp=tp, devices=jax.devices()[:tp])
    model = from_pretrained(directory, dtype=dtype.value, mesh=mesh, progress=_progress())
    return model, params


def _progress() -> bool:
    """Progress bars are for people."""
    return sys.stderr.isatty()


if __name__ == "__main__":
    main()
