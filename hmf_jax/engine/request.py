"""What is asked of the engine, what comes back, and the checks of both."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal, Protocol, Self

import jax
import numpy as np

from hmf_jax.config import HybridConfig
from hmf_jax.engine.programs import SMALLEST_CAPACITY, power_of_two
from hmf_jax.generation_config import GenerationDefaults
from hmf_jax.options import shown
from hmf_jax.sampling import SamplingParams

GREEDY = SamplingParams()
MAX_NEW_TOKENS = 128  # where neither the caller nor generation_config.json says how many
FinishReason = Literal["eos", "length", "capacity", "stop", "error"]
Tokens = Sequence[int] | np.ndarray | jax.Array
Whole = int | Sequence[int] | np.ndarray | jax.Array  # one number, or one per prompt
Prompts = Sequence[Tokens] | np.ndarray | jax.Array  # an array: [B, T]
# None: what holds where nothing is said.
Sampling = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any]] | None


class Constraint(Protocol):
    """Decides on the host which tokens may come next; belongs to one request."""

    def mask(self) -> np.ndarray | None:
        """Allowed tokens as bits, uint32 [ceil(V / 32)], token t in bit t % 32 of word t // 32;
        None: all are."""

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens were chosen, in this order."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: most new tokens.
      sampling: how to choose them.
      eos_ids: tokens that end it.
      num_iter: Chebyshev iterations of GKA layers; None = the config's.
      min_new_tokens: no end token before that many new tokens.
      top_logprobs: how many of the most likely tokens to tell at each place, see `New.top`.
      prompt_logprobs: also tell the log-probability of each token of the prompt, and so many of the
        most likely tokens there, see `Scored`; None: do not. With it max_new_tokens may be 0.
      priority: of those that wait, the lowest number gets a row first.
      cuts: places in the prompt, as numbers of tokens, up to which other prompts are likely to be
        the same: where the system message ends, where the reply begins.
      namespace: prompts share what was read only with those of the same namespace.
      constraint: which tokens are allowed next, see `Constraint`.

    Raises ValueError for limits that are not whole numbers, or too small.
    """

    prompt: Sequence[int]
    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: SamplingParams = GREEDY
    eos_ids: Sequence[int] = ()
    num_iter: int | None = None
    min_new_tokens: int = 0
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    priority: int = 0
    cuts: Sequence[int] = ()
    namespace: str = ""
    constraint: Constraint | None = None

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        for name in ("after", "keep", "marks", "back_to"):
            if name in settings:
                raise TypeError(
                    f"Request({name}=...) is gone: submit the whole prompt, and "
                    "Engine(prefixes='fast') finds what it has read; `cuts` say where to look."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.prompt_logprobs is not None:
            check_whole("prompt_logprobs", self.prompt_logprobs, 0)
        for place in self.cuts:
            check_whole("cuts", place, 1)
        check_whole("max_new_tokens", self.max_new_tokens, 1 if self.prompt_logprobs is None else 0)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("top_logprobs", self.top_logprobs, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than "
                f"max_new_tokens={self.max_new_tokens}."
            )
        if self.num_iter is not None:
            check_whole("num_iter", self.num_iter, 0)
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling={self.sampling!r} must be SamplingParams.")


@dataclasses.dataclass(frozen=True)
class Output:
    """What one prompt became.

    All log-probabilities are natural logarithms under the model's own distribution: before biases,
    penalties, processors, temperature and filters.

    Attributes:
      tokens: the new tokens, without the prompt; the last one is an end token if there was one.
      finish_reason: "eos" (an end token), "length" (max_new_tokens reached), "capacity" (the state
        of the row is full), "stop" (ended by the caller) or "error" (see `error`).
      logprobs: log-probability of each token; None unless asked for.
      error: why the row could not go on after these tokens: its logits were NaN or infinite. Says
        the row, the number of the new token and the first layer whose output was not finite.
      top_logprobs: {token: log-probability} of the most likely tokens at the place of each token,
        the most likely one first; None unless asked for.
      prompt_logprobs: log-probability of each token of the prompt after the ones before it, None
        for the first; None unless asked for.
      prompt_top_logprobs: the same for the most likely tokens there.
    """

    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    error: str | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None


def requests(
    config: HybridConfig,
    prompts: Prompts,
    *,
    max_new_tokens: Whole | None = None,
    sampling: Sampling = None,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: Whole | None = None,
    min_new_tokens: Whole = 0,
    top_logprobs: int = 0,
    settings: Mapping[str, Any] | None = None,
    defaults: GenerationDefaults | None = None,
) -> list[Request]:
    """One request per prompt; the other arguments are for all prompts or one per prompt.

    Args:
      settings: how to choose tokens by name, see `SamplingParams.of`; instead of `sampling`.
      defaults: what holds where nothing is said, see `hmf_jax.generation_config`.

    Raises:
      ValueError: see `hmf_jax.generate`.
    """
    ends: Any = eos_ids
    checked = check_prompts(prompts, config.vocab_size)
    defaults, count = defaults or GenerationDefaults(), len(checked)
    if max_new_tokens is None:
        max_new_tokens = [defaults.limit(len(prompt), MAX_NEW_TOKENS) for prompt in checked]
    if ends is None:
        ends = defaults.eos_ids or None
    columns = (
        checked,
        _per_prompt("max_new_tokens", max_new_tokens, count),
        sampling_of(sampling, settings or {}, defaults.settings, count),
        _end_ids(config, ends, count),
        _per_prompt("num_iter", num_iter, count),
        _per_prompt("min_new_tokens", min_new_tokens, count),
    )
    names = ("prompt", "max_new_tokens", "sampling", "eos_ids", "num_iter", "min_new_tokens")
    asked = [
        Request(**dict(zip(names, row, strict=True)), top_logprobs=top_logprobs)
        for row in zip(*columns, strict=True)
    ]
    for request in asked:
        check_request(config, request)
    return asked


def check_request(config: HybridConfig, request: Request) -> None:
    """Raises ValueError unless a model of this config can do what is asked for."""
    check_top(config, request.top_logprobs)
    V = config.vocab_size
    config.check_num_iter(request.num_iter)
    for token in dict(request.sampling.logit_bias):
        if token >= V:
            raise ValueError(f"logit_bias names token {token}, outside the vocabulary of {V}.")


def check_top(config: HybridConfig, count: int) -> None:
    """Raises ValueError if so many most likely tokens are more than there are."""
    if count > config.vocab_size:
        raise ValueError(
            f"{count} log-probabilities at each place are asked for, but the vocabulary has "
            f"{config.vocab_size} tokens."
        )


def sampling_of(
    sampling: Sampling,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    count: int,
) -> list[SamplingParams]:
    """How each of `count` prompts chooses its tokens.

    Args:
      sampling: `SamplingParams`, which are taken as they are, or settings by name; for all prompts
        or one per prompt.
      settings: the same by name, from keyword arguments; not both.
      defaults: of settings by name.

    Raises:
      ValueError: both spellings, unknown names, values out of range, or a wrong number of them.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if sampling is not None and given:
        names = ", ".join(given)
        raise ValueError(f"Both sampling= and {names} say how to choose tokens; pass one of them.")
    if sampling is None:
        sampling = given

    def one(value: Any) -> SamplingParams:
        if isinstance(value, Mapping):
            return SamplingParams.of(value, defaults)
        if not isinstance(value, SamplingParams):
            raise ValueError(
                f"sampling={value!r} must be SamplingParams, or a dict of its settings."
            )
        return value

    if isinstance(sampling, SamplingParams | Mapping) or not isinstance(sampling, Sequence):
        return [one(sampling)] * count
    if len(sampling) != count:
        raise ValueError(f"Got {len(sampling)} sampling settings for {count} prompts.")
    return [one(value) for value in sampling]


def check_prompts(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """The prompts as lists of Python ints.

    Raises:
      ValueError: no or empty prompts, something else than integers, or ids outside the vocabulary.
    """
    if isinstance(prompts, np.ndarray | jax.Array):
        if prompts.ndim != 2:
            hint = " Put a single prompt into a list: [prompt]." if prompts.ndim == 1 else ""
            raise ValueError(
                f"prompts are an array {list(prompts.shape)}, but must be [B, T] or a list.{hint}"
            )
        prompts = list(np.asarray(prompts))
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError("prompts must be a list with at least one list of token ids.")
    checked = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(f"Prompt {i} is text; use generate_text, or encode it to token ids.")
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


def tell_errors(errors: Mapping[int, str], count: int) -> None:
    """Says what went wrong in some of `count` rows: by an exception if there is only one row.

    Raises:
      FloatingPointError: with the row's message.
    """
    if count == 1:
        for message in errors.values():
            raise FloatingPointError(message)
    if errors:
        told = "; ".join(errors.values())
        warnings.warn(f"{len(errors)} of {count} rows failed: {told}", RuntimeWarning, 3)


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


def capacity_for(config: HybridConfig, needed: int, capacity: int | None = None) -> int:
    """`capacity`, or the bucket for `needed` tokens: a power of two, at most what RoPE covers."""
    if capacity is not None:
        return capacity
    return min(power_of_two(needed, SMALLEST_CAPACITY), config.max_position_embeddings)


def check_capacity(config: HybridConfig, capacity: int, ahead: int = 0) -> None:
    """Raises ValueError if rows of `capacity` tokens, whose positions are up to `ahead` more than
    the tokens they hold, go beyond what RoPE covers."""
    longest = config.max_position_embeddings
    if capacity + ahead > longest:
        raise ValueError(
            f"capacity={capacity} is more than max_position_embeddings={longest} allows; "
            "choose a smaller one, or raise max_position_embeddings in the model's config."
        )


def check_processor(processor: Any) -> None:
    """Raises ValueError unless it is None or can be called."""
    if processor is not None and not callable(processor):
        raise ValueError(f"processor={processor!r} must be a function of logits and context.")


def _end_ids(config: HybridConfig, eos_ids: Any, count: int) -> list[list[int]]:
    if eos_ids is None:
        stored = config.eos_token_id
        eos_ids = () if stored is None else (stored,) if isinstance(stored, int) else stored
    if isinstance(eos_ids, int | np.integer | str) or not hasattr(eos_ids, "__iter__"):
        raise ValueError(f"eos_ids={eos_ids!r} must be a list of token ids.")
    shared = all(isinstance(e, int | np.integer) for e in eos_ids)
    ends = [list(row) for row in ([eos_ids] * count if shared else eos_ids)]
    for id in (id for row in ends for id in row):
        check_whole("eos_ids", id, 0)
    ends = [[int(id) for id in row] for row in ends]
    if len(ends) != count:
        raise ValueError(f"Got {len(ends)} lists of end tokens for {count} prompts.")
    return ends


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, np.ndarray | jax.Array):
        value = np.asarray(value).tolist()
    alone = isinstance(value, str) or not isinstance(value, Sequence)
    values = [value] * count if alone else list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts.")
    return values


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is a whole number, `least` or more, that fits into int32."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number >= {least}.")
    if value >= 2**31:
        raise ValueError(f"{name}={shown(value)} must be a whole number < 2**31.")
