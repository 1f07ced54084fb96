"""B'MOJO-F attention as defined: dense masks for both windows, one softmax over their union."""

from __future__ import annotations

import jax

from hmf_jax.pallas_kernels.ops.attention.reference import (
    blank,
    dense_attention,
    own_tokens,
    visible_keys,
)
from hmf_jax.pallas_kernels.ops.two_window_attention.inputs import Inputs, Token
from hmf_jax.pallas_kernels.segments import leading


def two_window_attention(inputs: Inputs, *, window: int, scale: float) -> jax.Array:
    """Dense version of `pallas_kernels.two_window_attention`."""
    q, k, v, k_fading, v_fading, q_fading, offset, segment_ids, lengths = inputs
    length = q.shape[1]
    q_fading = q if q_fading is None else q_fading
    valid = own_tokens(q, segment_ids, lengths) if offset is None else None
    key_sets = []
    for query, key, value, newest in ((q, k, v, 0), (q_fading, k_fading, v_fading, window)):
        if valid is not None:
            query, key, value = (blank(x, valid[1]) for x in (query, key, value))
        visible = visible_keys(
            length,
            key.shape[1],
            newest=newest,
            oldest=newest + window - 1,
            offset=offset,
            past=None if offset is None else key.shape[1] - length,
            valid=valid,
        )
        key_sets.append((query, key, value, visible))
    o = dense_attention(key_sets, scale)
    return o if valid is None else blank(o, valid[1])


def two_window_decode(token: Token, *, scale: float) -> jax.Array:
    """Dense version of `pallas_kernels.two_window_decode`."""
    q, k, v, lengths_in, lengths_fading, q_fading = token
    half = k.shape[1] // 2
    key_sets = []
    for query, part, lengths in (
        (q, slice(None, half), lengths_in),
        (q if q_fading is None else q_fading, slice(half, None), lengths_fading),
    ):
        valid = leading(lengths, half)
        key_sets.append(
            (query[:, None], blank(k[:, part], valid), blank(v[:, part], valid), valid[:, None])
        )
    return dense_attention(key_sets, scale)[:, 0]
