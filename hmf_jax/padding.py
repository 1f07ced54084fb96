"""Padding has one owner: a model puts the valid tokens of each row first, layers rely on that."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def valid_first(valid: Array) -> Array:
    """Where each token goes so that the valid ones come first, in their order: [B, T] int32.

    Args:
      valid: [B, T] bool, False at padding.
    """
    before = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    after = before[:, -1:] + jnp.cumsum(~valid, axis=1, dtype=jnp.int32)
    return jnp.where(valid, before, after) - 1


def arrange(x: Array, place: Array | None) -> Array:
    """x [B, T] with each entry at its `place` (from `valid_first`); None: as it is."""
    if place is None:
        return x
    rows = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x).at[rows, place].set(x, unique_indices=True)


def restore(x: Array, place: Array | None) -> Array:
    """Undoes `arrange`, for x [B, T, ...]."""
    if place is None:
        return x
    return jnp.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)
