"""Grouped product, a chunk of rows of one group after the other; reads no matrix without rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def grouped_matmul_chunked(x: Array, weights: Array, sizes: Array) -> Array:
    """See `pallas_kernels.grouped_matmul`."""
    return _product(x, weights, sizes, 0)


def _forward(x: Array, weights: Array, sizes: Array):
    return _product(x, weights, sizes, 0), (x, weights, sizes)


def _backward(saved, d_y: Array):
    x, weights, sizes = saved
    chunk = _chunk(len(x), len(sizes))
    count, at = _chunks(sizes, chunk)
    x_rows, d_rows = (jnp.pad(a, ((0, chunk), (0, 0))) for a in (x, d_y))
    acc = jnp.promote_types(x.dtype, jnp.float32)

    def add(i: Array, d_weights: Array) -> Array:
        group, first, valid = at(i)
        rows = jnp.where(valid, jax.lax.dynamic_slice_in_dim(x_rows, first, chunk), 0)
        d = jnp.where(valid, jax.lax.dynamic_slice_in_dim(d_rows, first, chunk), 0)
        return d_weights.at[group].add(jnp.matmul(rows.T, d, preferred_element_type=acc))

    d_weights = jax.lax.fori_loop(0, count, add, jnp.zeros(weights.shape, acc))
    return _product(d_y, weights, sizes, 1), d_weights.astype(weights.dtype), None


grouped_matmul_chunked.defvjp(_forward, _backward)


def _product(x: Array, weights: Array, sizes: Array, transposed: int) -> Array:
    """x[m] @ weights[g], or times the transpose of that."""
    chunk = _chunk(len(x), len(sizes))
    count, at = _chunks(sizes, chunk)
    x_rows = jnp.pad(x, ((0, chunk), (0, 0)))
    acc = jnp.promote_types(x.dtype, jnp.float32)
    contract = ((1,), (transposed,)), ((), ())

    def write(i: Array, y: Array) -> Array:
        group, first, valid = at(i)
        rows = jax.lax.dynamic_slice_in_dim(x_rows, first, chunk)
        new = jax.lax.dot_general(rows, weights[group], contract, preferred_element_type=acc)
        # Rows behind the end of the group are those of the next chunk, or of no group.
        new = jnp.where(valid, new, 0).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, new, first, 0)

    y = jnp.zeros((len(x_rows), weights.shape[2 - transposed]), x.dtype)
    return jax.lax.fori_loop(0, count, write, y)[: len(x)]


def _chunk(rows: int, groups: int) -> int:
    """Rows of a chunk: about as many as a group has, a power of two from 8 to 128."""
    return min(128, max(8, 1 << (-(-rows // groups) - 1).bit_length()))


def _chunks(sizes: Array, chunk: int) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """How many chunks there are, and a function of the number of one: its group, its first row, and
    which of its rows [chunk, 1] are in the group."""
    ends = jnp.cumsum(sizes)
    numbers = -(-sizes // chunk)
    upto = jnp.cumsum(numbers)

    def at(i: Array) -> tuple[Array, Array, Array]:
        group = jnp.searchsorted(upto, i, side="right")
        first = ends[group] - sizes[group] + (i - upto[group] + numbers[group]) * chunk
        return group, first, (first + jnp.arange(chunk) < ends[group])[:, None]

    return upto[-1], at
