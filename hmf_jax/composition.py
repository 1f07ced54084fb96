"""State composition: the parts of a long context are read side by side, then made one state.

    state = hmf_jax.compose(model, context, chunks=4, prefix=instructions)
    model.generate([question], state=state)

Nothing is trained, and no part is longer than what the model was trained on; attention and
positions of the parts overlap. Source: PICASO, arXiv 2502.17605.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.engine import Tokens, check_prompts
from hmf_jax.mixers.attention import chronological, refill
from hmf_jax.model import HybridLM, PackedModel
from hmf_jax.state import (
    AttentionState,
    BMojoState,
    GKAState,
    Mamba2State,
    ModelState,
    WindowState,
)

Array = jax.Array
KV = ("concat", "last", "full")
SSM = ("soup", "fuse", "zero")
ROOM = 512  # tokens that fit after the context unless a capacity is given
Span = tuple[int, int, int]  # row, first token, end


def compose(
    model: HybridLM,
    context: Tokens,
    chunks: int,
    *,
    prefix: Tokens = (),
    kv: str = "concat",
    ssm: str = "soup",
    sequential: bool = False,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    num_iter: int | None = None,
    impl: str = "auto",
) -> ModelState:
    """Read a context in `chunks` parts, each as if it were alone, and merge what they leave behind.

    kv and ssm are the two halves of the original's compose_type: its "concat_kv_soup_ssm" is the
    default here, its "sw" is "last" (there it keeps everything), its "kv_only" is ssm="zero".

    Args:
      model: the model.
      context: token ids [L]; what follows it (a question) is not part of it.
      chunks: number of parts N of ceil(L / N) tokens, the last one being shorter.
      prefix: token ids in front of every part, for example instructions.
      kv: keys and values of attention, with a window or without. "concat": of the prefix and all
        parts, one after the other; "last": of the prefix and the last part only; "full": of one
        ordinary pass over the whole context (without a prefix), the parts only make states.
      ssm: states of all other layers. "soup": the mean over the parts; "fuse": for GKA the sum
        (additive information), for Mamba2 the mean over all orders in which the parts could follow
        each other (PICASO-S); "zero": nothing. Convolutions keep the mean of their last inputs,
        with "zero" nothing. B'MOJO-F: kv for its windows, ssm for its inner mixer.
      sequential: number the tokens of a part after those of the parts before. By default all parts
        start where the prefix ends, so that a long context needs no position that a part does not.
      capacity: tokens that the state can hold, those of the context included; default: 512 more.
      prefill_chunk: parts are fed in pieces of this many tokens; never changes the result.
      num_iter, impl: as in `HybridLM.__call__`.

    Returns:
      A state of one row, which `model(tokens, state=...)` and `generate(..., state=...)` continue.

    Raises:
      ValueError: a bad argument, more chunks than tokens, a part beyond max_position_embeddings, or
        "fuse" for Gated DeltaNet, whose transitions do not commute; nothing has run then.
    """
    config = model.config
    (context,) = check_prompts([context], config.vocab_size)
    (prefix,) = check_prompts([prefix], config.vocab_size) if len(prefix) else ([],)
    for name, value, known in (("kv", kv, KV), ("ssm", ssm, SSM)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if not 1 <= chunks <= len(context):
        raise ValueError(f"{chunks=} must be between 1 and the {len(context)} tokens of context.")
    if prefix and kv == "full":
        raise ValueError("kv='full' reads the context once: let it start with the prefix instead.")
    if prefill_chunk < 1:
        raise ValueError(f"{prefill_chunk=} must be at least 1.")
    kinds = set(config.student_kinds)
    if "BMF" in kinds and config.bmojo is not None:
        kinds.add(config.bmojo.ssm_mixer)
    if ssm == "fuse" and "GDN" in kinds:
        raise ValueError("Gated DeltaNet states cannot be fused; use ssm='soup'.")

    parts = _cut(context, chunks, even=kv == "full")
    rows = [prefix + part for part in parts]
    lengths, P = [len(row) for row in rows], len(prefix)
    longest = max(lengths)
    last = 0 if kv != "last" else len(rows) - 1
    spans = [(i, 0 if i == last else P, n) for i, n in enumerate(lengths) if i >= last]
    held = sum(end - start for _, start, end in spans)
    start = longest if kv != "full" and not sequential else P + len(context)
    room = config.max_position_embeddings - start
    capacity = held + min(ROOM, room) if capacity is None else capacity
    if not held < capacity <= held + room:
        raise ValueError(
            f"After {held} tokens, at position {start} of max_position_embeddings="
            f"{config.max_position_embeddings}, {capacity=} leaves no room or goes beyond: "
            f"choose one up to {held + room}, or more chunks."
        )
    feed = partial(_feed, model, prefill_chunk=prefill_chunk, num_iter=num_iter, impl=impl)
    before = [0, *itertools.accumulate(map(len, parts))] if sequential else [0] * len(parts)
    state = feed(rows, [_positions(P, n, b) for n, b in zip(lengths, before, strict=False)])
    whole = feed([context], [np.arange(held)], capacity=capacity) if kv == "full" else None
    return _merge(state, whole, tuple(spans), tuple(lengths), start, capacity, ssm)


def _cut(context: list[int], chunks: int, even: bool) -> list[list[int]]:
    """Parts of ceil(L / N) tokens, the last one shorter; even: sizes that differ by one at most."""
    if even:
        return [list(part) for part in np.array_split(context, chunks)]
    size = math.ceil(len(context) / chunks)
    return [context[at : at + size] for at in range(0, len(context), size)]


def _positions(prefix: int, length: int, before: int) -> np.ndarray:
    """Of a row: its prefix from 0 on, its part after as many tokens of other parts."""
    at = np.arange(length)
    return np.where(at < prefix, at, at + before)


def _feed(
    model: HybridLM,
    rows: Sequence[Sequence[int]],
    positions: Sequence[np.ndarray],
    *,
    prefill_chunk: int,
    capacity: int | None = None,
    **options: Any,
) -> ModelState:
    """The state after these rows, which need not be equally long."""
    size = max(map(len, rows))
    tokens, at, valid = (np.zeros((len(rows), size), np.int32) for _ in range(3))
    for i, (row, where) in enumerate(zip(rows, positions, strict=True)):
        tokens[i, : len(row)], at[i, : len(row)], valid[i, : len(row)] = row, where, 1
    state, packed = model.init_state(len(rows), capacity or size), PackedModel.of(model)
    for start in range(0, size, prefill_chunk):
        piece = [x[:, start : start + prefill_chunk] for x in (tokens, at, valid)]
        state = _prefill(packed, state, *piece, **options)
    return state


@partial(jax.jit, donate_argnames="state", static_argnames=("num_iter", "impl"))
def _prefill(packed, state, tokens, positions, valid, num_iter, impl):
    _, state = packed.model()(
        tokens, positions=positions, segment_ids=valid, state=state,
        num_iter=num_iter, last_only=True, impl=impl,
    )  # fmt: skip
    return state


@partial(jax.jit, static_argnames=("spans", "lengths", "position", "capacity", "ssm"))
def _merge(
    state: ModelState,
    whole: ModelState | None,
    spans: tuple[Span, ...],
    lengths: tuple[int, ...],
    position: int,
    capacity: int,
    ssm: str,
) -> ModelState:
    """One row of the parts' rows; keys and values those of `whole`, if given, else of the spans."""
    held = sum(end - start for _, start, end in spans)

    def gather(x: Array) -> Array:
        x = jnp.concatenate([x[row, start:end] for row, start, end in spans])
        return jnp.pad(x, ((0, capacity - held), (0, 0), (0, 0)))[None]

    def newest(x: Array, size: int) -> Array:
        """The last tokens of all spans [1, size, K, D], from those of each row [N, size, K, D]."""
        tails = [x[row, size - min(size, end - start) :] for row, start, end in spans]
        return jnp.pad(jnp.concatenate(tails), ((size, 0), (0, 0), (0, 0)))[None, -size:]

    counts, total, at, none = (jnp.array(x, jnp.int32) for x in (lengths, [held], [position], [0]))

    def ring(x: Array, lag: int, size: int) -> Array:
        return refill(x, total, none, x.shape[1], size, lag)

    def window(x: Array) -> Array:
        W = x.shape[1]
        return ring(newest(chronological(x, counts), W), 0, W)

    def fading(x: Array, pending: Array) -> tuple[Array, Array]:
        """Readable and pending entries, the readable ones being W tokens older."""
        W = pending.shape[1]
        both = [chronological(r, counts) for r in (x[:, W:], pending)]
        both = newest(jnp.concatenate(both, axis=1), 2 * W)
        return ring(both, W, W), ring(both, 0, W)

    def merged(layer: Any, full: Any) -> Any:
        match layer:
            case AttentionState():
                return full or AttentionState(gather(layer.k), gather(layer.v))
            case WindowState():
                return full or WindowState(window(layer.k), window(layer.v))
            case BMojoState():
                inner = _recurrent(layer.inner, ssm)
                if full is not None:
                    return dataclasses.replace(full, inner=inner)
                W = layer.k_pending.shape[1]
                (k, k_pending), (v, v_pending) = (
                    fading(x, pending)
                    for x, pending in ((layer.k, layer.k_pending), (layer.v, layer.v_pending))
                )
                k = jnp.concatenate([window(layer.k[:, :W]), k], axis=1)
                v = jnp.concatenate([window(layer.v[:, :W]), v], axis=1)
                return BMojoState(k, v, k_pending, v_pending, inner)
        return _recurrent(layer, ssm)

    fulls = [None] * len(state.layers) if whole is None else whole.layers
    layers = tuple(map(merged, state.layers, fulls))
    return ModelState(layers, total, at, capacity, fresh=False)


def _recurrent(layer: Any, ssm: str) -> Any:
    """The states [N, ...] of a layer without keys and values made one [1, ...]."""

    def over_rows(do: Callable[..., Array], x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return do(x.astype(wide), axis=0, keepdims=True).astype(x.dtype)

    if ssm == "zero":
        return jax.tree.map(lambda x: jnp.zeros_like(x[:1]), layer)
    mean = jax.tree.map(partial(over_rows, jnp.mean), layer)
    if isinstance(layer, Mamba2State):
        mean = dataclasses.replace(mean, log_decay=over_rows(jnp.sum, layer.log_decay))
    if ssm == "soup":
        return mean
    if isinstance(layer, GKAState):
        h_kk, h_kv = (over_rows(jnp.sum, x) for x in (layer.h_kk, layer.h_kv))
        return dataclasses.replace(mean, h_kk=h_kk, h_kv=h_kv)
    assert isinstance(layer, Mamba2State)
    weights = picaso_weights(layer.log_decay)
    return dataclasses.replace(mean, s=over_rows(jnp.sum, weights[..., None, None] * layer.s))


def picaso_weights(log_decay: Array) -> Array:
    """Weights of N states in their sum, averaged over all orders of their parts.

    In one order, state i decays by what the parts after it decay: S <- a_next S + S_next. Over all
    N! orders a state's weight is the mean over m of the elementary symmetric polynomials of the
    other parts' decays, c_i = 1/N sum_m e_m({a_j, j != i}) / binom(N - 1, m) (PICASO-S).

    Args:
      log_decay: [N, ...] log a_i, what a part decays an earlier state by.

    Returns:
      [N, ...] c_i; computed in log space.
    """
    N = len(log_decay)
    others = [[j for j in range(N) if j != i] for i in range(N)]
    polynomials = jnp.full((N, N, *log_decay.shape[1:]), -jnp.inf, log_decay.dtype)
    polynomials = polynomials.at[:, 0].set(0)  # [i, m]: log e_m of the parts so far
    for step in range(N - 1):
        a = log_decay[jnp.array([other[step] for other in others])]
        longer = jnp.logaddexp(polynomials[:, 1:], a[:, None] + polynomials[:, :-1])
        polynomials = polynomials.at[:, 1:].set(longer)
    orders = jnp.log(jnp.array([N * math.comb(N - 1, m) for m in range(N)], log_decay.dtype))
    orders = orders.reshape(1, N, *([1] * (log_decay.ndim - 1)))
    return jnp.exp(jax.nn.logsumexp(polynomials - orders, axis=1))
