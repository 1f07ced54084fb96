"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, penalties, logit biases.

Every setting is a runtime array with one entry per row, so rows of one batch may differ and
nothing is compiled again. The random bits of a row depend on its own seed and position only.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Bias = Mapping[int, float] | Iterable[tuple[int, float]]


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks its tokens. Applied in this order: logit bias, repetition penalty,
    presence and frequency penalty, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: logits are divided by it; 0 = greedy (the other filters then change nothing).
      top_k: keep the k largest logits (and what ties with the k-th); 0 = off.
      top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 = off.
      min_p: drop tokens less likely than min_p times the most likely one; 0 = off.
      repetition_penalty: logits of tokens already in the row (prompt or output) are divided by
        it if positive, multiplied if negative; 1 = off. Also acts on greedy choice.
      seed: two requests with the same seed and tokens draw the same continuation; give every
        copy of a prompt its own seed to get different ones.
      presence_penalty: subtracted from the logits of tokens that were generated (not those of the
        prompt), in [-2, 2]; 0 = off. As in OpenAI's API; also acts on greedy choice.
      frequency_penalty: the same, times how often the token was generated.
      logit_bias: {token: what is added to its logit}; -inf = never. Also acts on greedy choice.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Bias = ()

    def __post_init__(self) -> None:
        def need(name: str, allowed: str, kind: type, ok: Any) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not ok(value):
                raise ValueError(f"{name}={value!r}: it must be {allowed}.")

        finite = "a finite number >= 0 (0 = greedy)"
        need("temperature", finite, Real, lambda x: 0 <= x < math.inf)
        need("top_k", "a whole number >= 0 (0 = off)", Integral, lambda x: 0 <= x < 2**31)
        need("top_p", "in (0, 1] (1 = off)", Real, lambda x: 0 < x <= 1)
        need("min_p", "in [0, 1] (0 = off)", Real, lambda x: 0 <= x <= 1)
        need("repetition_penalty", "in [1e-6, 1e6] (1 = off)", Real, lambda x: 1e-6 <= x <= 1e6)
        need("seed", "a whole number in [0, 2**32)", Integral, lambda x: 0 <= x < 2**32)
        for name in ("presence_penalty", "frequency_penalty"):
            need(name, "in [-2, 2] (0 = off)", Real, lambda x: -2 <= x <= 2)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))  # can be hashed

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Settings by name, as Hugging Face's `generate` takes them: those above and do_sample.

        Without do_sample, naming a temperature other than 0, or a top_k, top_p or min_p, means to
        sample; the temperature is 1 unless it is given. do_sample=False is greedy.

        Args:
          settings: what was asked for; None stands for a setting that was not.
          defaults: what holds for all others, for example that of generation_config.json.

        Raises:
          ValueError: an unknown name, or a value out of range.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        known = [*(f.name for f in fields(cls)), "do_sample"]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1, 0)
                raise ValueError(f"{name!r} is no sampling setting; did you mean {near[0]!r}?")
        do_sample = given.pop("do_sample", None)
        if do_sample is not None and not isinstance(do_sample, bool):
            raise ValueError(f"do_sample={do_sample!r} must be True or False.")
        checked = cls(**given)  # what is wrong is told even where it would not be used
        given = {name: getattr(checked, name) for name in given}
        rest = {k: v for k, v in (defaults or {}).items() if v is not None}
        kept = rest.pop("do_sample", False)
        filters = [name for name in _RANDOM if name in given]
        if do_sample is None:
            do_sample = bool(given["temperature"]) if "temperature" in given else kept or filters
        elif do_sample and not given.get("temperature", 1):
            raise ValueError("do_sample=True needs a temperature above 0.")
        elif not do_sample and filters:
            warnings.warn(
                f"do_sample=False is greedy, so {', '.join(filters)} changes nothing.", stacklevel=3
            )
        values = {**rest, **given}
        if do_sample:
            return cls(**{"temperature": 1.0, **values})
        return cls(**{k: v for k, v in values.items() if k not in _RANDOM})


class SamplingSettings(TypedDict, total=False):
    """The keywords of `SamplingParams.of`."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None


_HOTTEST = 1e30
_RANDOM = ("temperature", "top_k", "top_p", "min_p")


def _biases(bias: Bias) -> tuple[tuple[int, float], ...]:
    pairs: list[Any] = []
    try:
        pairs = list(bias.items() if isinstance(bias, Mapping) else bias)
        ok = all(
            isinstance(token, Integral)
            and not isinstance(token, bool)
            and int(token) >= 0
            and isinstance(value, Real)
            and not isinstance(value, bool)
            and value < math.inf
            for token, value in pairs
        )
    except (TypeError, ValueError):
        ok = False
    if not ok or len(dict(pairs)) != len(pairs):
        raise ValueError(
            f"logit_bias={bias!r}: it must be {{token id: number}}, a finite one or -inf (never)."
        )
    return tuple(sorted((int(token), float(value)) for token, value in pairs))


class SamplingArrays(NamedTuple):
    """`SamplingParams` of a batch: one [B] array per field (float32; top_k int32, seed uint32).

    The last three are None unless a row asks for them, so that nobody else pays: penalties [B], and
    biases as tables of tokens and values [B, N], unused entries being tokens outside of the
    vocabulary. `seed` may also be random keys [B] of `jax.random`.
    """

    temperature: np.ndarray | Array
    top_k: np.ndarray | Array
    top_p: np.ndarray | Array
    min_p: np.ndarray | Array
    repetition_penalty: np.ndarray | Array
    seed: np.ndarray | Array
    presence_penalty: np.ndarray | Array | None = None
    frequency_penalty: np.ndarray | Array | None = None
    logit_bias: tuple[np.ndarray, np.ndarray] | None = None


_DTYPES = {"top_k": np.int32, "seed": np.uint32}
_FEWEST_BIASES = 16  # entries of the smallest table; a larger one is another program
MOST_BIASES = 1024  # entries of the table that is there whatever rows ask for


def stack_params(params: Sequence[SamplingParams], whole: bool = False) -> SamplingArrays:
    """The settings of `params` (one per row) as arrays for `sample`; `whole`: none is None."""

    def column(name: str) -> np.ndarray:
        values = [getattr(p, name) for p in params]
        if name == "temperature":  # more than fits into float32 makes all tokens alike, too
            values = [min(value, _HOTTEST) for value in values]
        return np.array(values, _DTYPES.get(name, np.float32))

    names = [f.name for f in fields(SamplingParams) if f.name != "logit_bias"]
    arrays: dict[str, Any] = {name: column(name) for name in names}
    if not (whole or arrays["presence_penalty"].any() or arrays["frequency_penalty"].any()):
        arrays["presence_penalty"] = arrays["frequency_penalty"] = None
    least = MOST_BIASES if whole else 0
    table = _table([dict(p.logit_bias) for p in params], least)
    return SamplingArrays(**arrays, logit_bias=table)


def _table(rows: Sequence[Mapping[int, float]], least: int) -> tuple[np.ndarray, np.ndarray] | None:
    most = max(least, *map(len, rows))
    if not most:
        return None
    width = max(_FEWEST_BIASES, 1 << (most - 1).bit_length())
    tokens = np.full((len(rows), width), np.iinfo(np.int32).max, np.int32)
    values = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], values[i, : len(row)] = list(row), list(row.values())
    return tokens, values


@jax.jit
def sample(
    logits: Array,
    params: SamplingArrays,
    positions: Array,
    seen: Array,
    generated: Array | None = None,
) -> tuple[Array, Array]:
    """Draw one token per row.

    Args:
      logits: [B, V], any float dtype.
      params: settings, each [B].
      positions: [B] int32, the index in its row of the token that is drawn.
      seen: [B, V] bool, the tokens that the repetition penalty applies to.
      generated: [B, V] integers, how often each token was generated; needed by presence and
        frequency penalties only.

    Returns:
      token [B] int32, and its log-probability [B] float32 (natural logarithm) under the model's
      own distribution, softmax(logits): before biases, penalties, temperature and filters.
    """
    raw = logits.astype(jnp.float32)
    token, _ = choose(adjust(raw, params, seen, generated), params, positions)
    return token, logprob(raw, token)[0]


def adjust(raw: Array, params: SamplingArrays, seen: Array, generated: Array | None) -> Array:
    """Logits [B, V] float32 after biases and penalties; arguments as in `sample`.

    Where no row asks for any, nothing is read but the settings.
    """
    asked = jnp.any(jnp.asarray(params.repetition_penalty) != 1)
    if params.logit_bias is not None:
        asked |= jnp.any(params.logit_bias[0] < raw.shape[1])
    if params.presence_penalty is not None and params.frequency_penalty is not None:
        if generated is None:
            raise ValueError("presence and frequency penalties need to know what was generated.")
        asked |= jnp.any((params.presence_penalty != 0) | (params.frequency_penalty != 0))

    def adjusted(scores: Array) -> Array:
        if params.logit_bias is not None:
            tokens, values = params.logit_bias
            rows = jnp.arange(len(scores))[:, None]
            scores = scores.at[rows, tokens].add(values, mode="drop")
        penalty = params.repetition_penalty[:, None]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
        if params.presence_penalty is not None and params.frequency_penalty is not None:
            assert generated is not None
            scores -= params.presence_penalty[:, None] * (generated > 0)
            scores -= params.frequency_penalty[:, None] * generated
        return scores

    return jax.lax.cond(asked, adjusted, lambda scores: scores, raw)


def choose(scores: Array, params: SamplingArrays, positions: Array) -> tuple[Array, Array]:
    """A token of each row by its scores [B, V] float32, and whether there is one to choose.

    Returns token [B] int32, ok [B] bool: False where a score is NaN or +inf, or all are -inf.
    """
    top = scores.max(-1)
    greedy = jnp.argmax(scores, -1).astype(jnp.int32)
    random = params.temperature > 0

    def draw(scores: Array) -> Array:
        # The largest score becomes 0, so that no temperature, however small, overflows.
        scores = scores - top[:, None]
        temperature = jnp.clip(params.temperature, 1 / _HOTTEST, _HOTTEST)
        scores /= jnp.where(random, temperature, 1)[:, None]
        filtered = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
        scores = jax.lax.cond(
            jnp.any(random & filtered), lambda s: _filter(s, params), lambda s: s, scores
        )
        noise = jax.vmap(_gumbel, (0, 0, None))(
            jnp.asarray(params.seed), positions, scores.shape[-1]
        )
        return jnp.where(random, jnp.argmax(scores + noise, -1).astype(jnp.int32), greedy)

    token = jax.lax.cond(jnp.any(random), draw, lambda _: greedy, scores)
    return token, jnp.isfinite(top)


def logprob(raw: Array, token: Array) -> tuple[Array, Array]:
    """Log-probability [B] of a token [B] under softmax(raw [B, V]), and the normaliser [B].

    The normaliser is not finite where a logit is NaN or +inf, or all are -inf.
    """
    total = jax.nn.logsumexp(raw, -1)
    return jnp.take_along_axis(raw, token[:, None], -1)[:, 0] - total, total


def _filter(scores: Array, params: SamplingArrays) -> Array:
    """Scores [B, V] (maximum 0) with -inf outside top-k, top-p and min-p."""
    ordered = jnp.sort(scores, axis=-1, descending=True)
    size = scores.shape[-1]
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, size), size)
    kth = jnp.take_along_axis(ordered, k[:, None] - 1, -1)
    probs = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), -1)
    before = jnp.cumsum(probs, -1) - probs  # probability of everything more likely
    top_p = params.top_p[:, None]
    nucleus = (before < top_p) | (top_p >= 1)
    floor = jnp.where(nucleus & (ordered >= kth), ordered, jnp.inf).min(-1, keepdims=True)
    floor = jnp.maximum(floor, jnp.log(params.min_p)[:, None])
    return jnp.where(scores >= floor, scores, -jnp.inf)


def _gumbel(seed: Array, position: Array, size: int) -> Array:
    # The generator is named because the default one can be changed by a global flag.
    is_key = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    key = seed if is_key else jax.random.key(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)
