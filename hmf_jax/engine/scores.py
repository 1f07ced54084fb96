"""Log-probabilities of given tokens: `score`, which is differentiable, and those of prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.engine.programs import SMALLEST_CHUNK, Top, as_dicts, power_of_two
from hmf_jax.engine.request import Request
from hmf_jax.layers import exact_dtype
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.state import ModelState

Array = jax.Array
POSITIONS = 2048  # whose logits exist at a time
Scores = tuple[list[float | None], list[dict[int, float] | None]]


def score(
    model: HybridLM,
    tokens: Array,
    lengths: Array | None = None,
    *,
    segment_ids: Array | None = None,
    num_iter: Array | int | None = None,
    impl: str = "auto",
    solver: str = "chebyshev",
) -> Array:
    """Log-probability of each token after the ones before it: log p(token t + 1 | tokens 0 .. t).

    Differentiable with respect to the model. Logits exist for 2048 positions at a time, in the
    backward pass, too.

    Args:
      model: the model.
      tokens: [B, T] integers.
      lengths: [B]; the first lengths[b] tokens of row b are valid, the others padding. None: all.
      segment_ids: [B, T] as in `HybridLM.__call__`, instead of lengths: 0 is padding, which may
        also lie between a prompt and what follows it; other numbers mark packed documents.
      num_iter, impl, solver: as in `HybridLM.__call__`.

    Returns:
      [B, T - 1] float32, natural logarithms under softmax(logits), entry t for token t + 1; 0 at
      padding and at the first token of a document.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    hidden = model.hidden(
        tokens, lengths=lengths, segment_ids=segment_ids, num_iter=num_iter, impl=impl,
        solver=solver,
    )  # fmt: skip
    targets, T = tokens[:, 1:], tokens.shape[1]
    if segment_ids is None:
        counts = None if lengths is None else jnp.arange(1, T) < jnp.asarray(lengths)[:, None]
        hidden = hidden[:, :-1]
    else:
        index = jnp.where(segment_ids != 0, jnp.arange(T), -1)
        before = jax.lax.cummax(index, axis=1)[:, :-1]  # the last valid token before each
        own = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
        counts = (before >= 0) & (segment_ids[:, 1:] == own) & (own != 0)
        hidden = jnp.take_along_axis(hidden, jnp.maximum(before, 0)[..., None], axis=1)
    found, _ = of_tokens(model, hidden, targets)
    return found if counts is None else jnp.where(counts, found, 0)


def of_tokens(
    model: HybridLM, hidden: Array, targets: Array, top: int = 0
) -> tuple[Array, Top | None]:
    """Log-probabilities [B, T] float32 of targets [B, T], and the `top` most likely tokens there.

    hidden [B, T, d]: what `HybridLM.hidden` returns.
    """
    B, T, d = hidden.shape
    kernel = model.head_kernel().astype(hidden.dtype)
    if T == 0:
        return jnp.zeros((B, 0), jnp.float32), None
    size = min(T, max(1, POSITIONS // B))
    count = -(-T // size)

    def cut(x: Array) -> Array:
        padding = [(0, 0), (0, count * size - T), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint  # the backward pass makes the logits again
    def piece(xs: tuple[Array, Array]) -> tuple[Array, Top | None]:
        x, target = xs
        kind = exact_dtype(x.dtype)
        logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=kind)
        total = jax.nn.logsumexp(logits, -1)
        # Unlike a gather, this leaves the vocabulary split over devices.
        is_target = target[..., None] == jnp.arange(kernel.shape[1])
        own = jnp.sum(jnp.where(is_target, logits, 0), -1) - total
        if not top:
            return own.astype(jnp.float32), None
        values, ids = jax.lax.top_k(logits, top)
        return own.astype(jnp.float32), Top(ids, (values - total[..., None]).astype(jnp.float32))

    def back(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(B, count * size, *x.shape[3:])[:, :T]

    return jax.tree.map(back, jax.lax.map(piece, (cut(hidden), cut(targets))))


def score_prompts(
    model: HybridLM,
    asked: Sequence[Request],
    *,
    top: int,
    capacity: int,
    chunk: int,
    state: ModelState | None,
    solver: str,
) -> list[Scores]:
    """For the prompt of each request: its log-probabilities and the `top` most likely tokens.

    Prompts are read one by one, in pieces of `chunk` tokens, after the rows of `state` if there is
    one. The first entry of each list is None.
    """
    packed, found = PackedModel.of(model), []
    for row, request in enumerate(asked):
        if state is None:
            held = model.init_state(1, capacity)
        else:
            held = state.gather(jnp.array([row]))
        scores: Scores = [None], [None]
        prompt = np.array([*request.prompt, 0], np.int32)  # nothing is known to follow the last
        for start in range(0, len(prompt) - 2, chunk):
            count = min(chunk, len(prompt) - 2 - start)
            width = min(power_of_two(count, SMALLEST_CHUNK), chunk)
            piece, targets = np.zeros((2, 1, width), np.int32)
            piece[0, :count] = prompt[start : start + count]
            targets[0, :count] = prompt[start + 1 : start + 1 + count]
            held, values, most = _score_piece(
                packed, held, piece, targets, np.array([count], np.int32), request.num_iter,
                top=top, fresh=state is None and start == 0, solver=solver,
            )  # fmt: skip
            scores[0].extend(np.asarray(values)[0, :count].tolist())
            if most is not None:
                scores[1].extend(as_dicts(*(np.asarray(x)[0, :count] for x in most)))
        found.append(scores)
    return found


@functools.partial(jax.jit, static_argnames=("top", "fresh", "solver"), donate_argnames=("state",))
def _score_piece(
    packed: PackedModel,
    state: ModelState,
    tokens: Array,
    targets: Array,
    lengths: Array,
    num_iter: Any,
    *,
    top: int,
    fresh: bool,
    solver: str,
) -> tuple[ModelState, Array, Top | None]:
    model, state = packed.model(), dataclasses.replace(state, fresh=fresh)
    x, ctx = model.embed(tokens, lengths=lengths, state=state, num_iter=num_iter, solver=solver)
    layers = []
    for layer in model.blocks(x, ctx, state):
        x = layer.x
        layers.append(layer.state)
    assert ctx.position is not None
    state = ModelState(tuple(layers), state.length + lengths, ctx.position, state.capacity)
    return state, *of_tokens(model, model.norm(x), targets, top)
