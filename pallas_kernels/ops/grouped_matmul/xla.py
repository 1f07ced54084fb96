"""Grouped product by the instruction that XLA has for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def why_not_xla() -> str | None:
    """Why `jax.lax.ragged_dot` should not run on this backend; None if it should."""
    if jax.default_backend() not in ("gpu", "tpu"):
        return "on this backend it multiplies every row by every matrix"
    return None


def grouped_matmul_xla(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_matmul`."""
    # What the instruction, and its gradient, make of rows without a group is not specified.
    grouped = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]
    y = jax.lax.ragged_dot(jnp.where(grouped, x, 0), weights, sizes)
    return jnp.where(grouped, y, 0)
