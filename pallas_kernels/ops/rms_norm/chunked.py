"""RMSNorm in plain jnp: any device, differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.rms_norm.inputs import Inputs, Options


def rms_norm_chunked(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.rms_norm`."""
    x, weight, residual, gate = inputs
    total = x if residual is None else x + residual
    acc = jnp.promote_types(x.dtype, jnp.float32)
    y = total.astype(acc)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + options.eps)
    if options.cast_first:
        return weight.astype(x.dtype) * y.astype(x.dtype), total
    y = y * (weight.astype(acc) + 1 if options.zero_centered else weight.astype(acc))
    if gate is not None:
        y = y * jax.nn.silu(gate.astype(acc))
    return y.astype(x.dtype), total
