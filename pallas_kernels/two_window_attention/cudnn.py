"""B'MOJO-F decode with tied weights is one plain attention over a prefix: cuDNN does that."""

from __future__ import annotations

import jax

from pallas_kernels.attention import cudnn


def why_not(q: jax.Array, k: jax.Array, v: jax.Array, q_fading: jax.Array | None) -> str | None:
    """Why cuDNN cannot take these arguments on this backend, or None if it can."""
    if q_fading is not None:
        return "cuDNN cannot score two sets of keys with two queries (q_fading is given)"
    return cudnn.why_not(q, k, v)


def two_window_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths_in: jax.Array,
    lengths_fading: jax.Array,
    q_fading: None,
    *,
    scale: float,
) -> jax.Array:
    """`two_window_decode` with tied weights; see the facade."""
    return cudnn.decode_attention(q, k, v, lengths_in + lengths_fading, scale=scale)
