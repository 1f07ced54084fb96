"""Drivers of the engine: generate, stream, warm up."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax

from hmf_jax.engine.batch import Batch
from hmf_jax.engine.engine import Engine
from hmf_jax.engine.programs import SMALLEST_CHUNK, power_of_two
from hmf_jax.engine.request import (
    Output,
    Prompts,
    Request,
    Sampling,
    Whole,
    capacity_for,
    check_room,
    check_top,
    check_whole,
    requests,
    tell_errors,
)
from hmf_jax.engine.scores import score_prompts
from hmf_jax.engine.settings import Processor
from hmf_jax.engine.storage import PAGE_SIZE
from hmf_jax.engine.turn import Finished, New, Scored
from hmf_jax.generation_config import generation_defaults
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingSettings
from hmf_jax.state import ModelState

TURNS = 4  # of a conversation that can be gone back to, at least
SPACING = 4  # fewest tokens between two states of a conversation that are kept


def generate(
    model: HybridLM,
    prompts: Prompts,
    *,
    max_new_tokens: Whole | None = None,
    sampling: Sampling = None,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: Whole | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    slots: int | None = None,
    state: ModelState | None = None,
    logprobs: bool | int = False,
    prompt_logprobs: bool | int = False,
    min_new_tokens: Whole = 0,
    processor: Processor | None = None,
    solver: str = "chebyshev",
    **settings: Unpack[SamplingSettings],
) -> list[Output]:
    """Continue each prompt until an end token, `max_new_tokens` or a full state.

        generate(model, [[5, 6, 7]], temperature=0.7, top_p=0.9, seed=1)

    How tokens are chosen and which ones end a row is what the caller says, else what
    generation_config.json in the model's directory says (as in Hugging Face's `generate`: single
    settings of the caller replace those of the file), else greedy and the config's end tokens.

    For throughput, pass many prompts and as many `slots` as the memory holds: that many rows decode
    together, and a row that is done makes room for the next prompt. Prompts are then prefilled one
    by one, so that their activations take no more memory than those of one chunk.

    Args:
      model: the model.
      prompts: token ids of each prompt; lengths may differ. Or an array [B, T].
      max_new_tokens: most new tokens, one number or one per prompt; None = what
        generation_config.json says, else 128.
      sampling: how to choose tokens, one setting or one per prompt: `SamplingParams`, taken as it
        is, or a dict, {"temperature": 0.7, "top_p": 0.9}, which is read like `settings`. A prompt's
        random bits depend on its own seed and positions only, not on the rest of the batch.
      eos_ids: end tokens, a list for all or one list per prompt; () = never end; None = those of
        generation_config.json and of the config together.
      num_iter: Chebyshev iterations of GKA layers, one number or one per prompt; None = the
        config's. The first other number compiles once more, all further ones do not.
      capacity: tokens each row can hold, prompt and output. None = what is needed, rounded up to a
        power of two, at most max_position_embeddings.
      prefill_chunk: prompts are fed in pieces of this many tokens; never changes the result. Longer
        ones take more memory and, of a long prompt, less time, most of all on several devices.
      slots: rows at a time, see `hmf_jax.memory.plan_memory` for how many fit; they are there for
        fewer prompts, too, so that a prompt's result does not depend, bit for bit, on how many
        others there are. None = all prompts are fed and decoded together.
      state: what the prompts continue, one row for each (`compose`, or an earlier call of the
        model); stays as it is. Its capacity counts; the repetition penalty does not see its tokens.
        Not with slots.
      logprobs: True: also return the log-probability of each token; a number n: and the n most
        likely tokens at each place.
      prompt_logprobs: the same for the tokens of the prompts, which without slots are then read
        twice.
      min_new_tokens: no end token before that many new tokens, one number or one per prompt.
      processor: a function (logits [B, V] float32, context) -> logits that `jax.jit` can trace,
        applied after biases and penalties; context is a `hmf_jax.engine.Context`. It must treat
        rows independently. Pass the same function object again: a new one compiles again.
      solver: of GKA layers, "chebyshev" or "cg", see `HybridLM.__call__`; each compiles once.
      settings: temperature, top_p, top_k, min_p, do_sample, seed, repetition_penalty,
        presence_penalty, frequency_penalty, logit_bias, for all prompts; see `SamplingParams.of`.
        Not with `sampling`.

    Returns:
      One `Output` per prompt, in order. A row whose logits are NaN or infinite ends there with
      finish_reason "error" (the others go on, unchanged), and a RuntimeWarning names it.

    Raises:
      ValueError: an empty prompt, token ids outside the vocabulary, a prompt that does not fit, or
        settings out of range; before anything runs.
      FloatingPointError: there is one prompt only, and its logits are NaN or infinite; says at
        which new token, and from which layer on.
    """
    most = _how_many("logprobs", logprobs)
    of_prompt = _how_many("prompt_logprobs", prompt_logprobs)
    asked = requests(
        model.config, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids,
        num_iter=num_iter, min_new_tokens=min_new_tokens, top_logprobs=most, settings=settings,
        defaults=generation_defaults(model),
    )  # fmt: skip
    check_top(model.config, of_prompt)
    options: dict[str, Any] = dict(
        capacity=capacity, prefill_chunk=prefill_chunk, processor=processor, solver=solver
    )
    if slots is None:
        driver, ids = Batch(model, asked, state=state, **options), list(range(len(asked)))
    elif state is not None:
        raise ValueError("Prompts in slots start from nothing: leave out slots or state.")
    else:
        check_whole("slots", slots, 1)
        if prompt_logprobs:
            asked = [dataclasses.replace(one, prompt_logprobs=of_prompt) for one in asked]
        driver, ids = _in_slots(model, asked, slots, interleave=0, **options)
    outputs = {id: Output([], "", [], None, [], [None], [None]) for id in ids}
    errors: dict[int, str] = {}
    if prompt_logprobs and isinstance(driver, Batch):
        found = score_prompts(
            model, asked, top=of_prompt, capacity=driver.capacity, chunk=prefill_chunk, state=state,
            solver=solver,
        )  # fmt: skip
        for id, (scores, top) in zip(ids, found, strict=True):
            more = {"prompt_logprobs": scores, "prompt_top_logprobs": top}
            outputs[id] = dataclasses.replace(outputs[id], **more)
    while driver.busy:
        for event in driver.step():
            if isinstance(event, New | Scored):
                _append(outputs[event.id], event)
            elif isinstance(event, Finished):
                error = _row_error(ids, event, errors)
                outputs[event.id] = dataclasses.replace(
                    outputs[event.id], finish_reason=event.reason, error=error
                )
    tell_errors(errors, len(ids))
    wanted = {
        "logprobs": logprobs,
        "top_logprobs": most,
        "prompt_logprobs": prompt_logprobs,
        "prompt_top_logprobs": of_prompt,
    }
    dropped = {name: None for name, value in wanted.items() if not value}
    return [dataclasses.replace(outputs[id], **dropped) for id in ids]


def stream(
    model: HybridLM,
    prompts: Prompts,
    *,
    tokens_per_dispatch: int = 8,
    max_new_tokens: Whole | None = None,
    sampling: Sampling = None,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: Whole | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    min_new_tokens: Whole = 0,
    processor: Processor | None = None,
    solver: str = "chebyshev",
    **settings: Unpack[SamplingSettings],
) -> Iterator[list[list[int]]]:
    """Like `generate`, but yields the new tokens of every prompt as they come.

    Prompts are read one after the other while those that have been read go on. Each item holds the
    new tokens of all prompts, in order: up to `tokens_per_dispatch` (at most 64) of each, after its
    first one; none of prompts that are not there yet or done. Same tokens as `generate`.

    Raises:
      ValueError: what `generate` raises, at the call.
      FloatingPointError: from the iterator, after all rows are done, if some failed.
    """
    check_whole("tokens_per_dispatch", tokens_per_dispatch, 1)
    asked = requests(
        model.config, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids,
        num_iter=num_iter, min_new_tokens=min_new_tokens, settings=settings,
        defaults=generation_defaults(model),
    )  # fmt: skip
    # To a power of two slots, so that similar numbers of prompts share programs.
    engine, ids = _in_slots(
        model, asked, power_of_two(len(asked)), capacity=capacity, prefill_chunk=prefill_chunk,
        processor=processor, solver=solver, interleave=tokens_per_dispatch,
    )  # fmt: skip

    def tokens() -> Iterator[list[list[int]]]:
        errors: dict[int, str] = {}
        while engine.busy:
            new: dict[int, list[int]] = {}
            for event in engine.step(tokens_per_dispatch):
                if isinstance(event, New):
                    new.setdefault(event.id, []).extend(event.tokens)
                elif isinstance(event, Finished):
                    _row_error(ids, event, errors)
            if new:
                yield [new.get(id, []) for id in ids]
        if errors:
            raise FloatingPointError("; ".join(errors.values()))

    return tokens()


def _append(output: Output, event: New | Scored) -> None:
    if isinstance(event, Scored):
        assert output.prompt_logprobs is not None and output.prompt_top_logprobs is not None
        output.prompt_logprobs.extend(event.logprobs)
        output.prompt_top_logprobs.extend(event.top)
    else:
        assert output.logprobs is not None and output.top_logprobs is not None
        output.tokens.extend(event.tokens)
        output.logprobs.extend(event.logprobs)
        output.top_logprobs.extend(event.top)


def _row_error(ids: Sequence[int], event: Finished, errors: dict[int, str]) -> str | None:
    """The message of a row that has failed, by prompt; also put among `errors`."""
    if event.error is None:
        return None
    row = ids.index(event.id)
    errors[row] = f"row {row}, {event.error}"
    return errors[row]


def _how_many(name: str, value: bool | int) -> int:
    """Of `logprobs`: how many of the most likely tokens."""
    if isinstance(value, bool):
        return 0
    check_whole(name, value, 0)
    return value


def _in_slots(
    model: HybridLM,
    asked: Sequence[Request],
    slots: int,
    *,
    capacity: int | None,
    prefill_chunk: int,
    processor: Processor | None,
    solver: str,
    interleave: int,
) -> tuple[Engine, list[int]]:
    """An engine with all of these requests in its queue, and their ids."""
    if capacity is not None:
        check_whole("capacity", capacity, 1)
    needed = max(len(request.prompt) + request.max_new_tokens for request in asked)
    capacity = capacity_for(model.config, needed, capacity)
    engine = Engine(
        model, slots, capacity=capacity, prefill_chunk=prefill_chunk, processor=processor,
        solver=solver, interleave=interleave,
    )  # fmt: skip
    check_room(model.config, [request.prompt for request in asked], [0] * len(asked), capacity)
    return engine, [engine.add(request) for request in asked]


def conversation_engine(
    model: HybridLM,
    *,
    capacity: int,
    prefill_chunk: int = 2048,
    solver: str = "chebyshev",
) -> Engine:
    """An engine of one slot, for a conversation: turns are prompts that begin like earlier ones."""
    return Engine(
        model,
        1,
        capacity=capacity,
        # A turn that goes on from an earlier one ends in a page of its own.
        pages=-(-capacity // PAGE_SIZE) + TURNS,
        page_size=PAGE_SIZE,
        prefill_chunk=prefill_chunk,
        prefixes="fast",
        spacing=SPACING,
        solver=solver,
    )


def warmup(
    model: HybridLM,
    *,
    capacity: int,
    batch: int = 1,
    slots: int | None = None,
    prefill_chunk: int = 2048,
    solver: str = "chebyshev",
) -> None:
    """Compile everything that generation with these settings will need.

    Args:
      model: the model.
      capacity, prefill_chunk, solver: of `generate`, or of a chat.
      batch: how many prompts `generate` gets, without slots; with one, a chat is compiled, too.
      slots: those of `generate`, then for any number of prompts; `batch` does not count.
    """
    named = {"capacity": capacity, "batch": batch, "prefill_chunk": prefill_chunk}
    for name, value in named.items():
        check_whole(name, value, 3 if name == "capacity" else 1)
    options: dict[str, Any] = dict(capacity=capacity, prefill_chunk=prefill_chunk, solver=solver)
    if slots is not None:
        Engine(model, slots, **options).warm()
        return
    room = capacity - 2  # of a prompt, with two tokens to generate
    size = min(prefill_chunk, room)
    sizes = [size]
    while size > SMALLEST_CHUNK:
        size = power_of_two(size) // 2
        sizes.append(size)
    later = [min(prefill_chunk + size, room) for size in sizes if prefill_chunk < room]
    for length in sorted({*sizes, *later}):
        running = Batch(model, [Request([0] * length, 2)] * batch, **options)
        while running.busy:
            running.step()
    if batch == 1:
        conversation_engine(model, **options).warm()


def enable_compilation_cache(directory: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs on disk, so that a new process does not compile them again.

    Also whole programs, in the directory "programs" there: see `hmf_jax.stored`.

    Args:
      directory: default the environment variable JAX_COMPILATION_CACHE_DIR, else
        ~/.cache/hmf_jax/xla.

    Returns:
      The directory, or None, after a warning, where nothing can be written: programs are compiled
      again then. Call this before anything is compiled.
    """
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/hmf_jax/xla"
    path = Path(default if directory is None else directory)
    try:
        path = path.expanduser()  # fails without HOME for a user that the system does not know
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:  # a full disk has room for a name only
            probe.write(bytes(4096))
    except (OSError, RuntimeError, ValueError) as e:
        warnings.warn(
            f"compiled programs are not kept: {path} cannot be written ({e}); set "
            "JAX_COMPILATION_CACHE_DIR to a directory that can",
            stacklevel=2,
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    return path
