"""Grouped product by the instruction that XLA has for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FEW = 256  # rows


def why_not_xla(rows: int) -> str | None:
    """Why `jax.lax.ragged_dot` should not run here on so many rows; None if it should."""
    backend = jax.default_backend()
    if backend == "tpu" or (backend == "gpu" and rows <= FEW):
        return None
    return f"on this backend it multiplies every row by every matrix ({rows} rows)"


def grouped_matmul_xla(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_matmul`."""
    # What the instruction, and its gradient, make of rows without a group is not specified.
    grouped = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]
    y = jax.lax.ragged_dot(jnp.where(grouped, x, 0), weights, sizes)
    return jnp.where(grouped, y, 0)
