"""Short causal convolution as a sum of shifted products: plain jnp, any device, differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.causal_conv1d.inputs import Inputs
from hmf_jax.pallas_kernels.segments import documents, leading


def causal_conv1d_chunked(inputs: Inputs, *, activation: str | None) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.causal_conv1d`."""
    if inputs.segment_ids is not None:
        return _packed(inputs, activation)
    x, lengths, T = inputs.x, inputs.lengths, inputs.x.shape[1]
    valid = None if lengths is None else leading(lengths, T)[..., None]
    x = x if valid is None else jnp.where(valid, x, 0)
    history = jnp.concatenate([inputs.state, x], axis=1)
    y = _sum(inputs, [history[:, i : i + T] for i in range(len(inputs.weight))], activation)
    if lengths is None or valid is None:
        return y, history[:, T:]
    return jnp.where(valid, y, 0), _newest(history, lengths, inputs.state.shape[1])


def _packed(inputs: Inputs, activation: str | None) -> tuple[jax.Array, jax.Array]:
    """The same for packed documents; without `lengths` padding may be anywhere."""
    x, segment_ids = inputs.x, inputs.segment_ids
    assert segment_ids is not None
    T, K = x.shape[1], len(inputs.weight)
    doc, valid = documents(segment_ids, inputs.lengths)
    x, order = jnp.where(valid[..., None], x, 0), None
    if inputs.lengths is None:
        # Move padding to the end: then the K-1 tokens before a token are the K-1 entries before it.
        order = jnp.argsort(~valid, axis=1, stable=True)
        doc, x = _permute(doc, order), _permute(x, order)
    doc = jnp.pad(doc, ((0, 0), (K - 1, 0)))
    history = jnp.concatenate([inputs.state, x], axis=1)

    def tap(i: int) -> jax.Array:
        same = doc[:, i : i + T] == doc[:, K - 1 :]
        return jnp.where(same[..., None], history[:, i : i + T], 0)

    y = _sum(inputs, [tap(i) for i in range(K)], activation)
    if order is not None:
        y = _permute(y, jnp.argsort(order, axis=1))
    count = jnp.sum(valid, axis=1)
    doc = _newest(doc, count, K - 1)
    state = _newest(history, count, K - 1)
    state = jnp.where((doc == doc[:, -1:])[..., None], state, 0)
    return jnp.where(valid[..., None], y, 0), state


def _sum(inputs: Inputs, taps: list[jax.Array], activation: str | None) -> jax.Array:
    """act(sum of weight_i * taps_i + bias), dtype of x."""
    x, bias = inputs.x, inputs.bias
    acc = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros(x.shape, acc) if bias is None else bias.astype(acc)
    for i, tap in enumerate(taps):
        y = y + inputs.weight[i].astype(acc) * tap
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype)


def _newest(history: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """The `size` entries of history [B, size + T, ...] that end with token count [B] - 1."""
    cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))
    return cut(history, count)


def _permute(x: jax.Array, order: jax.Array) -> jax.Array:
    """x[b, order[b, t]]; unlike `take_along_axis` its transpose knows that no index repeats."""
    return x.at[jnp.arange(len(x))[:, None], order].get(unique_indices=True)
