"""Programs of rows whose keys and values lie in pages, see `hmf_jax.state.ModelState.pages`.

A slot is the place of one row in the batch: everything that the row holds outside of pages.
`first` and `decode` of `hmf_jax.engine.programs` run over all slots; these are about one of them,
or about pages. All change their rows in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from hmf_jax.engine.programs import piece_size, with_pages
from hmf_jax.engine.rows import STOPPED, Appends, Rows, Top, map_appended, program
from hmf_jax.engine.scores import of_tokens
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.state import ModelState, advance, with_pools

Array = jax.Array


@program(others=2, donate_argnames=("rows", "logits"), static_argnames=("impl", "solver"))
def prefill_slot(
    packed: PackedModel,
    rows: Rows,
    logits: Array,
    slot: Array,
    table: Array,
    tokens: Array,
    length: Array,
    num_iter: Any,
    begins: Array,
    impl: str = "auto",
    solver: str = "chebyshev",
) -> tuple[Rows, Array, Array]:
    """Feeds the first `length` [1] of tokens [1, T] to a slot, whose row does not run.

    Args:
      table: [n] int32, the first pages of the row, which hold what it has so far and these tokens;
        attention reads all of them.
      begins: bool, the slot is emptied first. (One program serves the first chunk and the others:
        each takes seconds to compile.)

    Returns the rows, logits [B, V] and, for `score`, [1, T, d], the output of the last layer.
    """
    model = packed.model()
    apart = map_appended(lambda x: None, rows, model.appends)
    held = apart.state, apart.seen, apart.token
    state, seen, token = jax.tree.map(functools.partial(_cut, slot=slot), held)
    state, seen = jax.tree.map(lambda x: jnp.where(begins, 0, x).astype(x.dtype), (state, seen))
    state = with_pages(model, _with_pools(state, rows.state, model.appends), table[None])
    state, last, hidden = _feed(model, state, tokens, length, num_iter, impl, solver)
    valid = jnp.arange(tokens.shape[1]) < length
    seen = seen.at[0, tokens[0]].max(valid)
    newest = tokens[:, jnp.maximum(length[0] - 1, 0)]
    new = dataclasses.replace(
        map_appended(lambda x: None, dataclasses.replace(rows, state=state), model.appends),
        seen=seen,
        token=jnp.where(length > 0, newest, token),
        reason=jnp.full(1, STOPPED, jnp.int32),
        left=jnp.zeros(1, jnp.int32),
        made=jnp.zeros(1, jnp.int32),
        generated=None,
    )
    new = dataclasses.replace(new, state=dataclasses.replace(new.state, pages=None))
    generated, apart = rows.generated, dataclasses.replace(apart, generated=None)
    apart = jax.tree.map(functools.partial(_put, slot=slot), apart, new)
    rows = dataclasses.replace(
        apart, state=_with_pools(apart.state, state, model.appends), generated=generated
    )
    return rows, _put(logits, last, slot), hidden


def _feed(
    model: HybridLM, state: ModelState, tokens: Array, length: Array, num_iter: Any, impl: str,
    solver: str,
) -> tuple[ModelState, Array, Array]:  # fmt: skip
    """The state after these tokens, the logits of the last one [1, V], and hidden [1, T, d]."""
    size, hidden = piece_size(model.mesh, tokens.shape[1]), []
    for start in range(0, tokens.shape[1], size):
        piece, count = tokens[:, start : start + size], jnp.clip(length - start, 0, size)
        x, ctx = model.embed(
            piece, lengths=count, state=state, num_iter=num_iter, impl=impl, solver=solver
        )
        layers = []
        for layer in model.blocks(x, ctx, state):
            x = layer.x
            layers.append(layer.state)
        state = _advanced(state, layers, ctx, piece.shape[1])
        hidden.append(x)
    x = jnp.concatenate(hidden, axis=1)
    last = jax.lax.dynamic_slice_in_dim(x, jnp.maximum(length[0] - 1, 0), 1, axis=1)
    return state, model.logits(last)[:, 0], x


def _advanced(state: ModelState, layers: list[Any], ctx: Any, T: int) -> ModelState:
    new = advance(state, layers, ctx, T)
    assert new is not None
    return new


@functools.partial(jax.jit, static_argnames=("top",))
def score(packed: PackedModel, hidden: Array, targets: Array, top: int) -> tuple[Array, Top | None]:
    """Log-probabilities [1, T] of the tokens after those of `prefill_slot`; the `top` most likely.

    hidden [1, T, d]: its last result; targets [1, T].
    """
    model = packed.model()
    return of_tokens(model, model.norm(hidden), targets, top)


@program(others=1, static_argnames=("appends", "with_logits"))
def save(
    rows: Rows, logits: Array, slot: Array, appends: Appends, with_logits: bool
) -> tuple[Rows, Array | None]:
    """A copy of everything that a slot holds outside of pages: a batch of one without pools.

    And its logits [1, V], if they are asked for.
    """
    cut = functools.partial(_cut, slot=slot)
    held = jax.tree.map(cut, map_appended(lambda x: None, rows, appends))
    return held, cut(logits) if with_logits else None


@program(others=1, donate_argnames=("rows", "logits"), static_argnames=("appends", "resume"))
def load(
    rows: Rows,
    logits: Array,
    held: Rows,
    held_logits: Array | None,
    slot: Array,
    token: Array,
    seen: Array | None,
    appends: Appends,
    resume: bool,
) -> tuple[Rows, Array]:
    """What `save` returned, into a slot.

    Args:
      token: [1] int32, the newest token that the slot then holds; seen: [1, V] bool, its tokens, or
        None: nobody asks. Neither is read if `resume`.
      resume: the row goes on as it was; a row that had been stopped runs again. Otherwise it waits
        for its first token.
    """
    if resume:
        new = dataclasses.replace(held, reason=jnp.where(held.reason == STOPPED, 0, held.reason))
    else:
        none = jnp.zeros_like(held.left)
        new = dataclasses.replace(
            held,
            seen=jnp.zeros_like(held.seen) if seen is None else seen,
            token=token,
            reason=jnp.full_like(held.reason, STOPPED),
            left=none,
            made=none,
        )
    apart = map_appended(lambda x: None, rows, appends)
    if rows.generated is None:
        new = dataclasses.replace(new, generated=None)
    elif new.generated is None or not resume:
        new = dataclasses.replace(new, generated=jnp.zeros((1, logits.shape[1]), jnp.int32))
    apart = jax.tree.map(functools.partial(_put, slot=slot), apart, new)
    if held_logits is not None:
        logits = _put(logits, held_logits, slot)
    return dataclasses.replace(apart, state=_with_pools(apart.state, rows.state, appends)), logits


@program(others=0, donate_argnames=("rows",), static_argnames=("appends",))
def copy_pages(rows: Rows, pairs: Array, count: Array, appends: Appends) -> Rows:
    """The first `count` of these pages, pairs [n, 2] int32 (source, target), copied in order."""

    def copy(pool: Array) -> Array:
        def one(i: Array, pool: Array) -> Array:
            return _put(pool, _cut(pool, pairs[i, 0]), pairs[i, 1])

        return jax.lax.fori_loop(0, count, one, pool)

    return map_appended(copy, rows, appends)


@program(others=0, donate_argnames=("rows",), static_argnames=("appends",))
def zero_pages(rows: Rows, pages: Array, count: Array, appends: Appends) -> Rows:
    """The first `count` of these pages [n] int32 filled with zeros."""

    def clear(pool: Array) -> Array:
        empty = jnp.zeros((1, *pool.shape[1:]), pool.dtype)
        return jax.lax.fori_loop(0, count, lambda i, pool: _put(pool, empty, pages[i]), pool)

    return map_appended(clear, rows, appends)


@functools.partial(jax.jit, static_argnames=("appends",))
def read_page(rows: Rows, page: Array, appends: Appends) -> tuple[Array, ...]:
    """A page of all layers: one array [n, page, K, D] of the n pools of each shape."""
    found: dict[Any, list[Array]] = {}
    map_appended(lambda x: found.setdefault(_kind(x), []).append(_cut(x, page)), rows, appends)
    return tuple(jnp.concatenate(pools) for pools in found.values())


@program(others=0, donate_argnames=("rows",), static_argnames=("appends",))
def write_page(rows: Rows, held: tuple[Array, ...], page: Array, appends: Appends) -> Rows:
    """What `read_page` returned, into a page."""
    kinds: dict[Any, int] = {}
    map_appended(lambda x: kinds.setdefault(_kind(x), 0), rows, appends)
    arrays = dict(zip(kinds, held, strict=True))

    def put(pool: Array) -> Array:
        kind = _kind(pool)
        kinds[kind] += 1
        return _put(pool, arrays[kind][kinds[kind] - 1 : kinds[kind]], page)

    return map_appended(put, rows, appends)


@program(others=0, static_argnames=("capacity", "pages", "appends"))
def grow_pools(rows: Rows, capacity: int, pages: int, appends: Appends) -> Rows:
    """The same rows with room for more tokens, and more pages."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, pages - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])

    rows = map_appended(pad, rows, appends)
    return dataclasses.replace(rows, state=dataclasses.replace(rows.state, capacity=capacity))


def _kind(x: Array) -> tuple[Any, ...]:
    return x.shape, x.dtype


def _cut(x: Array, slot: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=0)


def _put(x: Array, one: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, one.astype(x.dtype), slot, axis=0)


def _with_pools(state: ModelState, pools: ModelState, appends: Appends) -> ModelState:
    """`state` with the pools of another one."""
    layers = tuple(map(with_pools, state.layers, pools.layers, appends))
    return dataclasses.replace(state, layers=layers)
