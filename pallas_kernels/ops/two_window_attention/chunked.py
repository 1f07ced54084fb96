"""B'MOJO-F attention in plain jnp: two streams of the blocked joint softmax."""

from __future__ import annotations

import jax

from hmf_jax.pallas_kernels.ops.attention import chunked
from hmf_jax.pallas_kernels.ops.attention.chunked import document_ids, joint_attention, make_stream


def two_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_fading: jax.Array,
    v_fading: jax.Array,
    q_fading: jax.Array | None,
    offset: jax.Array | None,
    segment_ids: jax.Array | None,
    kv_lengths: jax.Array | None,
    *,
    window: int,
    scale: float,
) -> jax.Array:
    """Blocked version of the `two_window_attention` facade; same arguments and result."""
    length = q.shape[1]
    doc = document_ids(segment_ids, kv_lengths, length)

    def stream(q: jax.Array, k: jax.Array, v: jax.Array, newest: int):
        past = None if offset is None else k.shape[1] - length
        oldest = newest + window - 1
        return make_stream(q, k, v, newest=newest, oldest=oldest, offset=offset, past=past, doc=doc)

    fading = stream(q if q_fading is None else q_fading, k_fading, v_fading, window)
    return joint_attention((stream(q, k, v, 0), fading), scale)


def two_window_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths_in: jax.Array,
    lengths_fading: jax.Array,
    q_fading: jax.Array | None,
    *,
    scale: float,
) -> jax.Array:
    """Blocked version of the `two_window_decode` facade; same arguments and result."""
    if q_fading is None:
        return chunked.decode_attention(q, k, v, lengths_in + lengths_fading, scale=scale)
    half = k.shape[1] // 2
    streams = (
        make_stream(q[:, None], k[:, :half], v[:, :half], offset=lengths_in - 1),
        make_stream(q_fading[:, None], k[:, half:], v[:, half:], offset=lengths_fading - 1),
    )
    return joint_attention(streams, scale)[:, 0]
