"""Attention as defined: one dense mask, one softmax. The oracle of the tests, for short inputs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.attention.inputs import Inputs, Token
from hmf_jax.pallas_kernels.segments import documents, leading


def dense_attention(
    key_sets: Sequence[tuple[jax.Array, jax.Array, jax.Array, jax.Array]], scale: float
) -> jax.Array:
    """Softmax over the visible keys of all key sets together.

    Args:
      key_sets: (q [B, T, H, D], k [B, S, K, D], v [B, S, K, D], visible [B, T, S] bool) each.
      scale: factor of the scores.

    Returns:
      [B, T, H, D] in the dtype of the values; zero where nothing is visible. float32 inside
      (float64 for float64 inputs).
    """
    dtype = key_sets[0][2].dtype
    acc = jnp.promote_types(dtype, jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    scores, values = [], []
    for q, k, v, visible in key_sets:
        q, k, v = (x.astype(acc) for x in (q, k, v))
        group = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        s = jnp.einsum("bthd,bshd->bhts", q, k, precision=exact) * scale
        scores.append(jnp.where(visible[:, None], s, -jnp.inf))
        values.append(v)
    s = jnp.concatenate(scores, axis=-1)
    sees = jnp.isfinite(s).any(-1, keepdims=True)
    p = jnp.where(sees, jax.nn.softmax(jnp.where(sees, s, 0), axis=-1), 0)
    o = jnp.einsum("bhts,bshd->bthd", p, jnp.concatenate(values, axis=1), precision=exact)
    return o.astype(dtype)


def visible_keys(
    length: int,
    keys: int,
    *,
    newest: int = 0,
    oldest: int | None = None,
    offset: jax.Array | None = None,
    past: int | None = None,
    valid: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """[B or 1, T, S] bool: which keys lie `newest` to `oldest` tokens behind which queries.

    Token indices follow the alignments of `pallas_kernels.attention`; `valid` is (document [B, T],
    not padding [B, T]) of the own tokens.
    """
    query = jnp.arange(length)[None, :, None]
    key = jnp.arange(keys)[None, None, :]
    if offset is not None:
        query = query + offset[:, None, None]
        if past is not None:
            key = key + offset[:, None, None] - past
    visible = (key >= 0) & (query - key >= newest)
    if oldest is not None:
        visible = visible & (query - key <= oldest)
    if valid is not None:
        doc, real = valid
        visible = visible & (doc[:, :, None] == doc[:, None]) & real[:, :, None] & real[:, None]
    return visible


def own_tokens(
    x: jax.Array, segment_ids: jax.Array | None, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Document and validity [B, T] of the tokens of x [B, T, ...]."""
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    if lengths is not None:
        ids = jnp.where(leading(lengths, x.shape[1]), ids, 0)
    return documents(ids)


def blank(x: jax.Array, valid: jax.Array) -> jax.Array:
    """x [B, T, H, D] with zeros at padding, whatever stood there."""
    return jnp.where(valid[:, :, None, None], x, 0)


def attention(inputs: Inputs, *, window: int | None, past: int | None, scale: float) -> jax.Array:
    """Dense version of `pallas_kernels.attention`."""
    q, k, v, offset, segment_ids, lengths = inputs
    valid = None
    if offset is None:
        valid = own_tokens(q, segment_ids, lengths)
        q, k, v = (blank(x, valid[1]) for x in (q, k, v))
    oldest = None if window is None else window - 1
    visible = visible_keys(
        q.shape[1], k.shape[1], oldest=oldest, offset=offset, past=past, valid=valid
    )
    o = dense_attention([(q, k, v, visible)], scale)
    return o if valid is None else blank(o, valid[1])


def decode_attention(token: Token, *, scale: float) -> jax.Array:
    """Dense version of `pallas_kernels.decode_attention`."""
    q, k, v, lengths = token
    valid = leading(lengths, k.shape[1])
    k, v = blank(k, valid), blank(v, valid)
    return dense_attention([(q[:, None], k, v, valid[:, None])], scale)[:, 0]
