"""The arrays of `causal_conv1d`, and the norm that may follow it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp


class L2Norm(NamedTuple):
    """Vectors of length one in place of heads: x / (|x| + eps), or x / sqrt(|x|^2 + eps) if
    `under_root`. Zero vectors stay zero."""

    head_dim: int
    eps: float = 1e-6
    under_root: bool = False


class Inputs(NamedTuple):
    """What every implementation takes, with the letters of `sharded.spec` ("c": channels).

    Attributes:
      x: [B, T, C].
      weight: [K, C] taps, oldest first.
      bias: [C], or None.
      state: [B, K-1, C], dtype of x: the newest inputs before x, newest last.
      segment_ids: [B, T] integers, 0 = padding, or None.
      lengths: [B] integers, leading tokens that are valid, or None. With both, `segment_ids` have
        no 0 among these.
    """

    x: Annotated[jax.Array, "btc"]
    weight: Annotated[jax.Array, "ic"]
    bias: Annotated[jax.Array | None, "c"]
    state: Annotated[jax.Array, "bic"]
    segment_ids: Annotated[jax.Array | None, "bt"]
    lengths: Annotated[jax.Array | None, "b"]


def l2_normalize(x: jax.Array, eps: float, *, under_root: bool) -> jax.Array:
    """Unit vectors along the last axis, in float32 (kept; float64 for float64)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    if under_root:
        return x * jax.lax.rsqrt(square + eps)
    positive = square > 0  # keeps the gradient of the root finite at zero
    root = jnp.sqrt(jnp.where(positive, square, 1.0))
    return x / (jnp.where(positive, root, 0.0) + eps)


def normalized(y: jax.Array, norm: L2Norm | None) -> jax.Array:
    """y [B, T, C], or its heads as unit vectors, in the dtype of y."""
    if norm is None:
        return y
    heads = y.reshape(*y.shape[:2], -1, norm.head_dim)
    heads = l2_normalize(heads, norm.eps, under_root=norm.under_root)
    return heads.astype(y.dtype).reshape(y.shape)
