"""What is asked of the engine, what comes back, and the checks of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Sized
from typing import Any, Literal

import jax
import numpy as np

from hmf_jax.config import HybridConfig
from hmf_jax.sampling import SamplingParams

GREEDY = SamplingParams()
FinishReason = Literal["eos", "length", "capacity", "stop"]
Tokens = Sequence[int] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: most new tokens.
      sampling: how to choose them.
      eos_ids: tokens that end it.
      num_iter: Chebyshev iterations of GKA layers; None = the config's.
      after: an earlier request of the same engine that was kept: its row is continued.
      keep: when it has ended, its row keeps what it holds until a request comes `after` it or
        `Engine.release` is called.
      marks: numbers of tokens in the row, within this prompt, to which a later request can go back;
        with `keep`. Each takes memory for a copy of what has a fixed size: recurrent states and
        windows, not the keys and values of full attention. Of the marks of the row that is
        continued, those that are not named here are given up.
      back_to: with `after`, a mark of that row: what it holds beyond is forgotten.

    Raises ValueError for limits that are not whole numbers, or too small.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    sampling: SamplingParams = GREEDY
    eos_ids: Sequence[int] = ()
    num_iter: int | None = None
    after: int | None = None
    keep: bool = False
    marks: Sequence[int] = ()
    back_to: int | None = None

    def __post_init__(self) -> None:
        _check_whole("max_new_tokens", self.max_new_tokens, 1)
        if self.num_iter is not None:
            _check_whole("num_iter", self.num_iter, 0)
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling={self.sampling!r} must be SamplingParams.")
        for place in self.marks:
            _check_whole("marks", place, 1)
        if self.marks and not self.keep:
            raise ValueError("marks are for requests whose rows are kept: pass keep=True.")
        if self.back_to is not None and self.after is None:
            raise ValueError(f"back_to={self.back_to} needs after=, the request to go back in.")


@dataclasses.dataclass(frozen=True)
class Output:
    """What one prompt became.

    Attributes:
      tokens: the new tokens, without the prompt; the last one is an end token if there was one.
      finish_reason: "eos" (an end token), "length" (max_new_tokens reached), "capacity" (the state
        of the row is full) or "stop" (ended by the caller).
      logprobs: log-probability of each token under the model's own distribution, before penalty,
        temperature and filters; None unless asked for.
    """

    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None


def requests(
    config: HybridConfig,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: int | Sequence[int] | None = None,
) -> list[Request]:
    """One request per prompt; the other arguments are for all prompts or one per prompt.

    Raises:
      ValueError: see `hmf_jax.generate`.
    """
    checked = check_prompts(prompts, config.vocab_size)
    count = len(checked)
    limits = _per_prompt("max_new_tokens", max_new_tokens, count)
    params = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != count:
        raise ValueError(f"Got {len(params)} sampling settings for {count} prompts.")
    ends = _end_ids(config, eos_ids, count)
    steps = _per_prompt("num_iter", num_iter, count)
    return [Request(*row) for row in zip(checked, limits, params, ends, steps, strict=True)]


def check_prompts(prompts: Sequence[Tokens], vocab_size: int) -> list[list[int]]:
    """The prompts as lists of Python ints.

    Raises:
      ValueError: no or empty prompts, something else than integers, or ids outside the vocabulary.
    """
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError("prompts must be a list with at least one list of token ids.")
    checked = []
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1:
            hint = " Put a single prompt into a list: [prompt]." if ids.ndim == 0 else ""
            raise ValueError(f"Prompt {i} must be a flat list of token ids.{hint}")
        if not ids.size:
            raise ValueError(f"Prompt {i} is empty; it needs at least one token.")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"Prompt {i} holds {ids.dtype}, not integer token ids.")
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise ValueError(
                f"Prompt {i} holds token id {int(outside[0])}, outside the vocabulary of "
                f"{vocab_size}; does the tokenizer belong to this model?"
            )
        checked.append(ids.tolist())
    return checked


def check_room(
    config: HybridConfig, prompts: Sequence[Sized], held: Sequence[int], capacity: int
) -> None:
    """Raises ValueError unless every prompt leaves room after the tokens that its row holds."""
    for i, (prompt, n) in enumerate(zip(prompts, held, strict=True)):
        if n + len(prompt) >= capacity:
            after = f" after {n} tokens already held" if n else ""
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens{after}, which leaves no room in a capacity "
                f"of {capacity}; shorten it or pass a larger capacity (at most "
                f"max_position_embeddings={config.max_position_embeddings})."
            )


def _end_ids(config: HybridConfig, eos_ids: Any, count: int) -> list[list[int]]:
    if eos_ids is None:
        stored = config.eos_token_id
        eos_ids = () if stored is None else (stored,) if isinstance(stored, int) else stored
    shared = all(isinstance(e, (int, np.integer)) for e in eos_ids)
    ends = [[int(e) for e in row] for row in ([eos_ids] * count if shared else eos_ids)]
    if len(ends) != count:
        raise ValueError(f"Got {len(ends)} lists of end tokens for {count} prompts.")
    return ends


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts.")
    return values


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number >= {least}.")
