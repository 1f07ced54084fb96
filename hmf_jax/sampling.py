"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

Every setting is a runtime array with one entry per row, so rows of one batch may differ and
nothing is compiled again. The random bits of a row depend on its own seed and position only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks its tokens. Applied in this order (that of Hugging Face `generate`):
    repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: logits are divided by it; 0 = greedy (the other filters then change nothing).
      top_k: keep the k largest logits (and what ties with the k-th); 0 = off.
      top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 = off.
      min_p: drop tokens less likely than min_p times the most likely one; 0 = off.
      repetition_penalty: logits of tokens already in the row (prompt or output) are divided by
        it if positive, multiplied if negative; 1 = off. Also acts on greedy choice.
      seed: two requests with the same seed and tokens draw the same continuation; give every
        copy of a prompt its own seed to get different ones.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r}: it must be {allowed}.")

        whole = {n: isinstance(getattr(self, n), Integral) for n in ("top_k", "seed")}
        need(0 <= self.temperature < math.inf, "temperature", "a finite number >= 0 (0 = greedy)")
        need(whole["top_k"] and 0 <= self.top_k < 2**31, "top_k", "a whole number >= 0 (0 = off)")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1] (1 = off)")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1] (0 = off)")
        need(0 < self.repetition_penalty < math.inf, "repetition_penalty", "> 0 (1 = off)")
        need(whole["seed"] and 0 <= self.seed < 2**32, "seed", "a whole number in [0, 2**32)")


class SamplingArrays(NamedTuple):
    """`SamplingParams` of a batch: one [B] array per field (float32; top_k int32, seed uint32)."""

    temperature: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    min_p: np.ndarray | jax.Array
    repetition_penalty: np.ndarray | jax.Array
    seed: np.ndarray | jax.Array


_DTYPES = {"top_k": np.int32, "seed": np.uint32}


def stack_params(params: Sequence[SamplingParams]) -> SamplingArrays:
    """The settings of `params` (one per row) as arrays for `sample`."""
    return SamplingArrays(
        **{
            f.name: np.array([getattr(p, f.name) for p in params], _DTYPES.get(f.name, np.float32))
            for f in fields(SamplingParams)
        }
    )


@jax.jit
def sample(
    logits: jax.Array, params: SamplingArrays, positions: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row.

    Args:
      logits: [B, V], any float dtype.
      params: settings, each [B].
      positions: [B] int32, the index in its row of the token that is drawn.
      seen: [B, V] bool, the tokens that the repetition penalty applies to.

    Returns:
      token [B] int32, and its log-probability [B] float32 (natural logarithm) under the model's
      own distribution, softmax(logits): before penalty, temperature and filters.
    """
    raw = logits.astype(jnp.float32)
    penalty = params.repetition_penalty[:, None]
    scores = jnp.where(seen, jnp.where(raw > 0, raw / penalty, raw * penalty), raw)
    # The largest score becomes 0, so that no temperature, however small, overflows.
    scores -= scores.max(-1, keepdims=True)
    greedy = jnp.argmax(scores, -1).astype(jnp.int32)
    random = params.temperature > 0

    def draw(scores: jax.Array) -> jax.Array:
        scores = scores / jnp.where(random, params.temperature, 1)[:, None]
        filtered = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
        scores = jax.lax.cond(
            jnp.any(random & filtered), lambda s: _filter(s, params), lambda s: s, scores
        )
        noise = jax.vmap(_gumbel, (0, 0, None))(
            jnp.asarray(params.seed), positions, scores.shape[-1]
        )
        return jnp.where(random, jnp.argmax(scores + noise, -1).astype(jnp.int32), greedy)

    token = jax.lax.cond(jnp.any(random), draw, lambda _: greedy, scores)
    chosen = jnp.take_along_axis(raw, token[:, None], -1)[:, 0]
    return token, chosen - jax.nn.logsumexp(raw, -1)


def _filter(scores: jax.Array, params: SamplingArrays) -> jax.Array:
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


def _gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    # The generator is named because the default one can be changed by a global flag.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (size,), jnp.float32)
