"""B'MOJO-F attention in plain jnp: two streams of the blocked joint softmax."""

from __future__ import annotations

import jax

from hmf_jax.pallas_kernels.ops.attention import chunked
from hmf_jax.pallas_kernels.ops.attention import inputs as attention_inputs
from hmf_jax.pallas_kernels.ops.attention.chunked import (
    Stream,
    document_ids,
    joint_attention,
    make_stream,
)
from hmf_jax.pallas_kernels.ops.two_window_attention.inputs import Inputs, Token


def make_streams(inputs: Inputs, *, window: int) -> tuple[Stream, Stream]:
    """The in-context stream and the fading one."""
    q, k, v, k_fading, v_fading, q_fading, offset, segment_ids, lengths = inputs
    length = q.shape[1]
    doc = document_ids(segment_ids, lengths, length)

    def stream(q: jax.Array, k: jax.Array, v: jax.Array, newest: int) -> Stream:
        past = None if offset is None else k.shape[1] - length
        oldest = newest + window - 1
        return make_stream(q, k, v, newest=newest, oldest=oldest, offset=offset, past=past, doc=doc)

    fading = stream(q if q_fading is None else q_fading, k_fading, v_fading, window)
    return stream(q, k, v, 0), fading


def two_window_attention(inputs: Inputs, *, window: int, scale: float) -> jax.Array:
    """Blocked version of `pallas_kernels.two_window_attention`."""
    return joint_attention(make_streams(inputs, window=window), scale)


def two_window_decode(token: Token, *, scale: float) -> jax.Array:
    """Blocked version of `pallas_kernels.two_window_decode`."""
    q, k, v, lengths_in, lengths_fading, q_fading = token
    if q_fading is None:
        plain = attention_inputs.Token(q, k, v, lengths_in + lengths_fading)
        return chunked.decode_attention(plain, scale=scale)
    half = k.shape[1] // 2
    streams = (
        make_stream(q[:, None], k[:, :half], v[:, :half], offset=lengths_in - 1),
        make_stream(q_fading[:, None], k[:, half:], v[:, half:], offset=lengths_fading - 1),
    )
    return joint_attention(streams, scale)[:, 0]
