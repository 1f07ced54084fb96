"""`generate` and `chat`: text from a model."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from hmf_jax.cli.errors import progress
from hmf_jax.cli.options import (
    TP,
    Capacity,
    DType,
    Dtype,
    MaxNewTokens,
    MinP,
    Model,
    NumIter,
    Penalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)


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
    from hmf_jax.text import generate_text, stream_text

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
    from hmf_jax.text import ChatSession

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
    _talk(session)


def _talk(session: Any) -> None:
    """Reads lines and prints replies, until the end of the input or /exit."""
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


def _load(
    name: str, dtype: DType, tp: int, num_iter: int | None, seed: int, **sampling: Any
) -> tuple[Any, Any]:
    """The model, and its recommended sampling with what the command line gives in its place.

    Everything that can be wrong is looked at before the weights are loaded.
    """
    import jax

    from hmf_jax.config import HybridConfig
    from hmf_jax.engine import enable_compilation_cache
    from hmf_jax.loading import from_pretrained, resolve
    from hmf_jax.sharding import make_mesh
    from hmf_jax.text import default_sampling

    if tp > jax.device_count():
        raise ValueError(f"--tp {tp} needs {tp} devices, but there are {jax.device_count()}.")
    directory = resolve(name, progress=progress())
    HybridConfig.from_json(directory).check_num_iter(num_iter)
    given = {key: value for key, value in sampling.items() if value is not None}
    params = dataclasses.replace(default_sampling(directory), seed=seed, **given)
    enable_compilation_cache()
    mesh = None if tp == 1 else make_mesh(tp=tp, devices=jax.devices()[:tp])
    model = from_pretrained(directory, dtype=dtype.value, mesh=mesh, progress=progress())
    return model, params
