"""Short causal convolution as a sum of shifted products: plain jnp, any device, differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.segments import documents


def causal_conv1d_chunked(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    activation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.causal_conv1d`."""
    B, T, C = x.shape
    K = weight.shape[0]
    acc = jnp.promote_types(x.dtype, jnp.float32)
    doc, valid, order = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool), None
    if segment_ids is not None:
        # Move padding to the end: then the K-1 tokens before a token are the K-1 entries before it.
        doc, valid = documents(segment_ids)
        order = jnp.argsort(~valid, axis=1, stable=True)
        doc = _permute(doc, order)
        x = _permute(jnp.where(valid[..., None], x, 0), order)
    doc = jnp.pad(doc, ((0, 0), (K - 1, 0)))
    history = jnp.concatenate([state, x], axis=1)

    y = jnp.zeros((B, T, C), acc) if bias is None else bias.astype(acc)
    for i in range(K):
        same = doc[:, i : i + T] == doc[:, K - 1 :]
        y = y + weight[i].astype(acc) * jnp.where(same[..., None], history[:, i : i + T], 0)
    if activation == "silu":
        y = jax.nn.silu(y)
    y = y.astype(x.dtype)
    if order is not None:
        y = jnp.where(valid[..., None], _permute(y, jnp.argsort(order, axis=1)), 0)

    newest = valid.sum(axis=1)[:, None] + jnp.arange(K - 1)
    state = jnp.take_along_axis(history, newest[..., None], axis=1)
    doc = jnp.take_along_axis(doc, newest, axis=1)
    return y, jnp.where((doc == doc[:, -1:])[..., None], state, 0)


def _permute(x: jax.Array, order: jax.Array) -> jax.Array:
    """x[b, order[b, t]]; unlike `take_along_axis` its transpose knows that no index repeats."""
    return x.at[jnp.arange(len(x))[:, None], order].get(unique_indices=True)
