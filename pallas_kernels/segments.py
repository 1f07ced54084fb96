"""Packed documents and padding, as every operator sees them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def documents(
    segment_ids: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Number the documents of packed rows.

    Args:
      segment_ids: [B, T] integers; 0 marks padding, a change between two non-zero neighbours
        (padding skipped) starts a new document.
      lengths: [B] integers: padding is all that follows so many tokens, and none of them has
        number 0. Cheaper, as nobody has to look for it.

    Returns:
      doc: [B, T] int32, non-decreasing, 0 for the first document of a row (the one that continues
        an initial state). Padding carries the number of the document before it.
      valid: [B, T] bool, False at padding.
    """
    if lengths is not None:
        valid = leading(lengths, segment_ids.shape[1])
        starts = valid[:, 1:] & (segment_ids[:, 1:] != segment_ids[:, :-1])
        starts = jnp.pad(starts, ((0, 0), (1, 0)))
        return jnp.cumsum(starts, axis=1, dtype=jnp.int32), valid
    valid = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1])
    last = jax.lax.cummax(jnp.where(valid, index, -1), axis=1)
    previous = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
    before = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    starts = valid & (previous >= 0) & (segment_ids != before)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32), valid


def leading(lengths: jax.Array, length: int) -> jax.Array:
    """[B, T] bool: the first `lengths` [B] of T = `length` tokens."""
    return jnp.arange(length) < lengths[:, None]
