"""The command line: `hmf-jax --help`. The only part of the package that prints."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import itertools
import os
import sys
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
_prime = typer.Typer(
    help="Make a hybrid from a Transformer: choose layers, build it, distil it, unfuse it.",
    no_args_is_help=True,
)
app.add_typer(_prime, name="prime")
_bench = typer.Typer(
    help="Measure speed and memory; needs the repository, not only the installed package.",
    no_args_is_help=True,
)
app.add_typer(_bench, name="bench")
_settings = {"debug": False}


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error.")
    ] = False,
) -> None:
    _settings["debug"] = debug


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on stderr and exit code 1."""

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

    return guarded


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command."""
    return app.command()(_guarded(function))


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
    from hmf_jax.loading import from_pretrained
    from hmf_jax.priming import loss_and_gradients
    from hmf_jax.verify import verify_dir

    def load(path: Path, dtype: Any) -> Any:
        return from_pretrained(path, dtype=dtype, progress=False)

    options: Any = dict(distillation=loss_and_gradients, dtype=dtype.value, rtol=rtol)
    ok = True
    for path in directory:
        report = verify_dir(path, load, **options)
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
def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file: model, data, output, a recipe (distill, long_context, instruct, "
            "reasoning) or a learning rate and its schedule, and more; see TrainConfig."
        ),
    ],
    fields: Annotated[
        list[str] | None,
        typer.Argument(help="field=value, in place of the file's, e.g. learning_rate=1e-5 fsdp=8."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only show the data, what is trained, memory and cost of a step."
        ),
    ] = False,
) -> None:
    """Fine-tune a model on texts or chats. A run that was stopped goes on where it was."""
    from hmf_jax.generation import enable_compilation_cache
    from hmf_jax.training.config import TrainConfig, fine_tune, plan

    run = TrainConfig.load(config, fields or ())
    enable_compilation_cache()
    if dry_run:
        typer.echo(plan(run))
        return
    fine_tune(run, progress=_progress(), report=typer.echo)


@_prime.command("init")
@_guarded
def prime_init(
    base: Annotated[
        str | None, typer.Argument(help="Directory or repository of a Qwen3 Transformer.")
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
    prime_directory(**values, overwrite=overwrite, progress=_progress(), report=typer.echo)


@_prime.command("distill")
@_guarded
def prime_distill(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file: model (a fused one), data, output, target (none, decoder, mixer, "
            "residuals, all), pre_lm_head, weighted, and what `hmf-jax train` reads; see "
            "DistillConfig."
        ),
    ],
    fields: Annotated[
        list[str] | None,
        typer.Argument(help="field=value, in place of the file's, e.g. target=decoder steps=500."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only show the data, what is trained, memory and cost of a step."
        ),
    ] = False,
) -> None:
    """Stage 1: let the new layers learn what attention did. A stopped run goes on where it was."""
    from hmf_jax.generation import enable_compilation_cache
    from hmf_jax.priming import DistillConfig, distill

    run = DistillConfig.load(config, fields or ())
    enable_compilation_cache()
    distill(run, progress=_progress(), report=typer.echo, dry_run=dry_run)


@_prime.command("unfuse")
@_guarded
def prime_unfuse(
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

    options: Any = dict(dtype=dtype.value, overwrite=overwrite, progress=_progress())
    unfuse_directory(directory, output, report=typer.echo, **options)


@_prime.command("select")
@_guarded
def prime_select(
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
        Path | None, typer.Option(help="With --base: texts or chats (JSONL, Parquet) to score on.")
    ] = None,
    length: Annotated[int, typer.Option(help="With --data: tokens per row.")] = 8192,
    rows: Annotated[int, typer.Option(help="With --data: rows to score on.")] = 16,
    variants: Annotated[
        Path | None,
        typer.Option(help="With --base: write a model per layer here, for other evaluations."),
    ] = None,
    window: Annotated[int, typer.Option(help="Window of the layer in question, tokens.")] = 2048,
    dtype: Dtype = DType.bfloat16,
) -> None:
    """Choose the layers whose attention can go: those that do least harm when it is windowed."""
    from hmf_jax.priming import read_scores, select_layers, selection

    if (data is not None or variants is not None) and base is None:
        raise ValueError("--data and --variants need the model: --base.")
    if base is not None and data is None and variants is None:
        raise ValueError("--base needs --data to score it on, or --variants to write.")
    if variants is not None:
        from hmf_jax.loading import resolve

        directory = resolve(str(base), progress=_progress())
        written = selection.write_swa_variants(directory, variants, window=window)
        typer.echo(f"{len(written)} variants in {variants}, with links to {directory}.")
        if data is None:
            return
    if data is not None:
        _score(str(base), data, scores, length, rows, window, dtype)
    found = read_scores(scores)
    chosen = select_layers(
        found, m, num_layers=num_layers, exclude_layer_0=exclude_layer_0, task_filter=task_filter
    )
    for layer, mean in chosen.ranking:
        typer.echo(f"{layer:5d}  {mean:10.4f}{'  chosen' if layer in chosen.layers else ''}")
    if chosen.tie is not None:
        typer.echo(f"tie: {chosen.tie}.")
    count = num_layers or max(found.rows) + 1
    typer.echo(f"layers: {','.join(map(str, chosen.layers))}")
    typer.echo(f"pattern: {selection.pattern(chosen.layers, count, kind)}")


@_command
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


def _benchmark(name: str, help: str) -> None:
    """Register `hmf-jax bench NAME`, which leaves all its arguments to benchmarks/NAME.py."""

    def run(ctx: typer.Context) -> None:
        module = name.replace("-", "_")
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

    settings = dict(allow_extra_args=True, ignore_unknown_options=True, help_option_names=[])
    _bench.command(name, help=help, context_settings=settings)(_guarded(run))


_benchmark("serve-table", "Decoding with the memory full and time to first token, as a table.")
_benchmark("run", "Operators, models and training steps, one row per measurement.")
_benchmark("full-size", "A full-size checkpoint: loading, first token, memory.")
_benchmark("compare", "Two files of rows, or two commits.")


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


def _score(
    base: str, data: Path, file: Path, length: int, rows: int, window: int, dtype: DType
) -> None:
    """Adds the log-likelihood of the data under the base and its variants to a CSV of scores."""
    from hmf_jax.chat import load_tokenizer
    from hmf_jax.generation import enable_compilation_cache
    from hmf_jax.loading import from_pretrained, resolve
    from hmf_jax.priming import likelihood, score_layers
    from hmf_jax.training import Batches

    enable_compilation_cache()
    directory = resolve(base, progress=_progress())
    tokenizer = load_tokenizer(directory)
    batches = Batches([str(data)], tokenizer, length=length, batch_size=1, epochs=1, shuffle=False)
    score = likelihood(itertools.islice(batches, rows))
    model = from_pretrained(directory, dtype=dtype.value, progress=_progress())

    def done(layer: int) -> None:
        typer.echo(f"scored {'the base' if layer < 0 else f'layer {layer}'}")

    score_layers(model, score, file, window=window, done=done)


def _progress() -> bool:
    """Progress bars are for people."""
    return sys.stderr.isatty()


if __name__ == "__main__":
    main()
