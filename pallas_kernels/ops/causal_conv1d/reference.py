"""Short causal convolution, token by token: the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.causal_conv1d.inputs import Inputs
from hmf_jax.pallas_kernels.segments import documents, leading


def causal_conv1d_reference(
    inputs: Inputs, *, activation: str | None
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.causal_conv1d`."""
    x, weight, bias, state, segment_ids, lengths = inputs
    B, T, _ = x.shape
    acc = jnp.promote_types(x.dtype, jnp.float32)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    doc, valid = documents(ids if lengths is None else jnp.where(leading(lengths, T), ids, 0))

    def token(carry, inputs):
        window, before = carry  # [B, K-1, C] newest last, [B]
        x_bc, doc_b, valid_b = inputs
        x_bc = jnp.where(valid_b[:, None], x_bc, 0)
        history = jnp.where((doc_b == before)[:, None, None], window, 0)
        taps = jnp.concatenate([history, x_bc[:, None]], axis=1)
        y = jnp.sum(taps.astype(acc) * weight.astype(acc), axis=1)
        if bias is not None:
            y = y + bias.astype(acc)
        if activation == "silu":
            y = y * jax.nn.sigmoid(y)
        window = jnp.where(valid_b[:, None, None], taps[:, 1:], window)
        y = jnp.where(valid_b[:, None], y, 0)
        return (window, doc_b), y.astype(x.dtype)

    carry = (state, jnp.zeros(B, jnp.int32))
    (window, _), y = jax.lax.scan(token, carry, (x.swapaxes(0, 1), doc.T, valid.T))
    return y.swapaxes(0, 1), window
