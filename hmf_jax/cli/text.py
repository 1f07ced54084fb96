"""`generate` and `chat`: text from a model."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Annotated, Any

import typer

from hmf_jax.cli.errors import progress, say
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
from hmf_jax.convert.reading import read_json


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(help="Text to continue; several make a batch.")],
    max_new_tokens: MaxNewTokens = None,
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
        _show(prompt[0])
        for piece in pieces:
            _show(piece)
        typer.echo()
        return
    for text, reply in zip(prompt, generate_text(loaded, prompt, **options), strict=True):
        _show(f"{text}{reply.text}\n---\n")


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
    max_new_tokens: MaxNewTokens = None,
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
    """Talk to a model. /help lists what else can be typed; /exit or Ctrl-D ends it."""
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
    if not _talk(session) and not sys.stdin.isatty():
        raise typer.Exit(1)


_TURNS = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
HELP = """\
/reset       forget the conversation
/save FILE   write the conversation to a new file: a row of data for `hmf-jax train`
/load FILE   go on with a conversation that was saved
/exit        end the chat, as Ctrl-D does; Ctrl-C ends a reply"""


def _talk(session: Any) -> bool:
    """Reads lines and prints replies, until the end of the input or /exit.

    Returns:
      Whether everything was answered.
    """
    people = sys.stdin.isatty()
    fine, warned = True, False
    while True:
        try:
            text = input("you> " if people else "").strip()
        except EOFError:
            typer.echo()
            return fine
        except KeyboardInterrupt:
            if warned or not people:
                raise
            warned = True
            typer.echo()
            say("Ctrl-D or /exit ends the chat")
            continue
        warned = False
        if text == "/exit":
            return fine
        if text:
            try:
                fine = _do(session, text) and fine
            except (ValueError, OSError, ArithmeticError) as e:
                if isinstance(e, BrokenPipeError):
                    raise
                say(str(e))
                fine = False


def _do(session: Any, text: str) -> bool:
    """Obeys or answers a line; whether it could."""
    command, _, argument = text.partition(" ")
    if text == "/help":
        typer.echo(HELP)
    elif text == "/reset":
        session.reset()
    elif command == "/save" and argument:
        row = json.dumps({"messages": session.messages}, ensure_ascii=False)
        with Path(argument).expanduser().open("x", encoding="utf-8") as file:
            file.write(row + "\n")
    elif command == "/load" and argument:
        session.messages = read_json(Path(argument).expanduser()).get("messages")
    elif command.startswith("/") and command == text and "/" not in text[1:]:
        say(f"{text} is no command; /help lists them")
        return False
    else:
        return _answer(session, text)
    return True


def _answer(session: Any, text: str) -> bool:
    """Prints the reply to a text; makes room for it if the conversation is full."""
    pieces = _begin(session, text)
    try:
        for piece in pieces:
            _show(piece)
    except KeyboardInterrupt:  # ends the reply, not the chat
        pass
    finally:
        pieces.close()
        typer.echo()
    last = session.last
    if last is not None and last.finish_reason == "length":
        say(f"the reply was cut after {len(last.tokens)} tokens, see --max-new-tokens")
    if last is not None and last.finish_reason == "capacity":
        say("the conversation is full, so the reply was cut; the oldest turns will be forgotten")
    return True


def _begin(session: Any, text: str) -> Any:
    """The pieces of the reply; the oldest turns are forgotten if there is no room for it."""
    from hmf_jax.text import ConversationFull

    before, forgotten = list(session.messages), 0
    while True:
        try:
            pieces = session.stream(text)
        except ConversationFull:
            if not session.forget_oldest():
                session.messages = before
                raise
            forgotten += 1
        else:
            if forgotten:
                say(f"the conversation is full: forgot its oldest turn{'s' * (forgotten > 1)}")
            return pieces


def _show(text: str) -> None:
    """Text of a model; what would steer a terminal is written out there."""
    if sys.stdout.isatty():
        text = "".join(_written_out(c) if _steers(c) else c for c in text)
    typer.echo(text, nl=False, color=True)  # as it is, where it is no terminal


def _steers(c: str) -> bool:
    """Whether a character is a control character, or changes the direction of writing."""
    turns = unicodedata.bidirectional(c) in _TURNS
    return turns or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")


def _written_out(c: str) -> str:
    return c.encode("ascii", "backslashreplace").decode() if c > "\x7e" else f"\\x{ord(c):02x}"


def _load(
    name: str, dtype: DType, tp: int, num_iter: int | None, seed: int, **sampling: Any
) -> tuple[Any, Any]:
    """The model, and its recommended sampling with what the command line gives in its place.

    Everything that can be wrong is looked at before the weights are loaded.
    """
    import jax

    from hmf_jax.config import HybridConfig
    from hmf_jax.engine import enable_compilation_cache
    from hmf_jax.generation_config import generation_defaults
    from hmf_jax.loading import from_pretrained, resolve
    from hmf_jax.sampling import SamplingParams
    from hmf_jax.sharding import make_mesh

    if tp > jax.device_count():
        raise ValueError(f"--tp {tp} needs {tp} devices, but there are {jax.device_count()}.")
    directory = resolve(name, progress=progress())
    config = HybridConfig.from_json(directory)
    config.check_num_iter(num_iter)
    defaults = generation_defaults(config, directory)
    params = SamplingParams.of({**sampling, "seed": seed}, defaults.settings)
    enable_compilation_cache()
    mesh = None if tp == 1 else make_mesh(tp=tp, devices=jax.devices()[:tp])
    model = from_pretrained(directory, dtype=dtype.value, mesh=mesh, progress=progress())
    return model, params
