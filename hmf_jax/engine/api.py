"""Drivers of the engine: generate, stream, warm up."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from hmf_jax.config import HybridConfig
from hmf_jax.engine.buffers import SMALLEST_CAPACITY, SMALLEST_CHUNK, power_of_two
from hmf_jax.engine.engine import Engine
from hmf_jax.engine.request import GREEDY, Output, Request, Tokens, check_room, requests
from hmf_jax.engine.scheduler import Finished, New
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from hmf_jax.state import ModelState


def generate(
    model: HybridLM,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: int | Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    slots: int | None = None,
    state: ModelState | None = None,
    logprobs: bool = False,
) -> list[Output]:
    """Continue each prompt until an end token, `max_new_tokens` or a full state.

    For throughput, pass many prompts and as many `slots` as the memory holds: that many rows decode
    together, and a row that is done makes room for the next prompt. Prompts are then prefilled one
    by one, so that their activations take no more memory than those of one chunk.

    Args:
      model: the model.
      prompts: token ids of each prompt; lengths may differ.
      max_new_tokens: most new tokens, one number or one per prompt.
      sampling: how to choose tokens (default greedy), one setting or one per prompt. A prompt's
        random bits depend on its own seed and positions only, not on the rest of the batch.
      eos_ids: end tokens, a list for all or one list per prompt; None = the config's
        eos_token_id, () = never end.
      num_iter: Chebyshev iterations of GKA layers, one number or one per prompt; None = the
        config's. The first other number compiles once more, all further ones do not.
      capacity: tokens each row can hold, prompt and output. None = what is needed, rounded up to a
        power of two, at most max_position_embeddings.
      prefill_chunk: prompts are fed in pieces of this many tokens; never changes the result. Longer
        ones take more memory and, of a long prompt, less time, most of all on several devices.
      slots: most rows at a time, see `hmf_jax.memory.plan_memory`; None = all prompts are fed and
        decoded together.
      state: what the prompts continue, one row for each (`compose`, or an earlier call of the
        model); stays as it is. Its capacity counts; the repetition penalty does not see its tokens.
        Not with slots.
      logprobs: also return the log-probability of each token.

    Returns:
      One `Output` per prompt, in order.

    Raises:
      ValueError: an empty prompt, token ids outside the vocabulary, a prompt that does not fit, or
        settings out of range; before anything runs.
    """
    asked = requests(
        model.config, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids,
        num_iter=num_iter,
    )  # fmt: skip
    engine, ids = start(
        model, asked, capacity=capacity, prefill_chunk=prefill_chunk, slots=slots, state=state
    )
    tokens: dict[int, list[int]] = {id: [] for id in ids}
    scores: dict[int, list[float]] = {id: [] for id in ids}
    reasons: dict[int, str] = {}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, New):
                tokens[event.id] += event.tokens
                scores[event.id] += event.logprobs
            elif isinstance(event, Finished):
                reasons[event.id] = event.reason
    return [Output(tokens[id], reasons[id], scores[id] if logprobs else None) for id in ids]


def stream(
    model: HybridLM,
    prompts: Sequence[Tokens],
    *,
    tokens_per_dispatch: int = 8,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: int | Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
) -> Iterator[list[list[int]]]:
    """Like `generate`, but yields the new tokens of every prompt after each dispatch.

    The first item holds the first token of each prompt, later ones up to `tokens_per_dispatch`
    (at most 64) tokens per prompt, none for prompts that are done. Same tokens as `generate`.
    """
    asked = requests(
        model.config, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids,
        num_iter=num_iter,
    )  # fmt: skip
    engine, ids = start(model, asked, capacity=capacity, prefill_chunk=prefill_chunk)

    def tokens() -> Iterator[list[list[int]]]:
        while engine.busy:
            new = {e.id: e.tokens for e in engine.step(tokens_per_dispatch) if isinstance(e, New)}
            yield [new.get(id, []) for id in ids]

    return tokens()


def start(
    model: HybridLM,
    asked: Sequence[Request],
    *,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    slots: int | None = None,
    state: ModelState | None = None,
) -> tuple[Engine, list[int]]:
    """An engine that fits these requests, with all of them in its queue, and their ids.

    Arguments and errors as in `generate`.
    """
    if slots is not None and state is not None:
        raise ValueError("Prompts in slots start from nothing: leave out slots or state.")
    if slots is not None and slots < 1:
        raise ValueError(f"{slots=} must be at least 1.")
    if state is None:
        needed = max(len(request.prompt) + request.max_new_tokens for request in asked)
        capacity = capacity_for(model.config, needed, capacity)
        # To a power of two rows, so that batches of similar sizes share programs.
        rows = power_of_two(len(asked)) if slots is None else min(slots, len(asked))
        held = [0] * len(asked)
    else:
        capacity = state.capacity if capacity is None else capacity
        rows, held = len(asked), state.length.tolist()
    engine = Engine(
        model,
        rows,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
        together=slots is None,
        state=state,
    )
    check_room(model.config, [request.prompt for request in asked], held, capacity)
    after = engine.held if state is not None else [None] * len(asked)
    ids = [
        engine.add(dataclasses.replace(request, after=row))
        for request, row in zip(asked, after, strict=True)
    ]
    return engine, ids


def warmup(model: HybridLM, *, capacity: int, batch: int = 1, prefill_chunk: int = 2048) -> None:
    """Compile everything that `generate` or a chat with these three settings will need.

    Runs the model on dummy tokens: each prefill bucket as a first and as a later piece of a prompt,
    and the decode loop.
    """
    longest = min(prefill_chunk, capacity - 2)
    sizes = {longest}
    while longest > SMALLEST_CHUNK:
        longest = power_of_two(longest) // 2
        sizes.add(longest)
    for size in sorted(sizes):
        engine = Engine(
            model,
            power_of_two(batch),
            capacity=capacity,
            prefill_chunk=prefill_chunk,
            together=True,
        )
        ids = [engine.add(Request([0] * size, 2, keep=True)) for _ in range(batch)]
        _drain(engine)
        room = capacity - len(engine.context(ids[0])) - 1
        for id in ids if room > 0 else ():
            engine.add(Request([0] * min(size, room), 1, after=id))
        _drain(engine)


def _drain(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def enable_compilation_cache(directory: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs on disk, so that a new process does not compile them again.

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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return path


def capacity_for(config: HybridConfig, needed: int, capacity: int | None = None) -> int:
    """`capacity`, or the bucket for `needed` tokens: a power of two, at most what RoPE covers."""
    if capacity is not None:
        return capacity
    return min(power_of_two(needed, SMALLEST_CAPACITY), config.max_position_embeddings)
