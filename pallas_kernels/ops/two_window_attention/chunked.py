"""B'MOJO-F attention in plain jnp: two key sets of the blocked joint softmax."""

from __future__ import annotations

import jax

from hmf_jax.pallas_kernels.ops.attention import chunked
from hmf_jax.pallas_kernels.ops.attention import inputs as attention_inputs
from hmf_jax.pallas_kernels.ops.attention.chunked import (
    KeySet,
    document_ids,
    joint_attention,
    make_key_set,
)
from hmf_jax.pallas_kernels.ops.two_window_attention.inputs import Inputs, Token


def make_key_sets(inputs: Inputs, *, window: int) -> tuple[KeySet, KeySet]:
    """The in-context key set and the fading one."""
    q, k, v, k_fading, v_fading, q_fading, offset, segment_ids, lengths = inputs
    length = q.shape[1]
    doc = document_ids(segment_ids, lengths, length)

    def key_set(q: jax.Array, k: jax.Array, v: jax.Array, newest: int) -> KeySet:
        past = None if offset is None else k.shape[1] - length
        reach = {"newest": newest, "oldest": newest + window - 1}
        return make_key_set(q, k, v, offset=offset, past=past, doc=doc, **reach)

    fading = key_set(q if q_fading is None else q_fading, k_fading, v_fading, window)
    return key_set(q, k, v, 0), fading


def two_window_attention(inputs: Inputs, *, window: int, scale: float) -> jax.Array:
    """Blocked version of `pallas_kernels.two_window_attention`."""
    return joint_attention(make_key_sets(inputs, window=window), scale)


def two_window_decode(token: Token, *, scale: float) -> jax.Array:
    """Blocked version of `pallas_kernels.two_window_decode`."""
    q, k, v, lengths_in, lengths_fading, q_fading = token
    if q_fading is None:
        plain = attention_inputs.Token(q, k, v, lengths_in + lengths_fading)
        return chunked.decode_attention(plain, scale=scale)
    half = k.shape[1] // 2
    key_sets = (
        make_key_set(q[:, None], k[:, :half], v[:, :half], offset=lengths_in - 1),
        make_key_set(q_fading[:, None], k[:, half:], v[:, half:], offset=lengths_fading - 1),
    )
    return joint_attention(key_sets, scale)[:, 0]
