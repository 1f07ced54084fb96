"""Adapter to the Hopper kernels of the package jax-linear-attention (`jla`, optional).

Its "simple_gla" is SSD with q = C, k = B, v = dt * x, g = dt * A and states [N, P]. dt * x is
rounded to x's dtype before the kernel, once more than in the other implementations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.ssd.inputs import Inputs


def ssd(inputs: Inputs, *, kernel: str = "mosaic_gpu") -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ssd`; `kernel` names the package's own implementation."""
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

    x, B, C, dt, A, D, state, doc = inputs
    group = C.shape[2] // B.shape[2]
    x, B = (jnp.repeat(t, group, axis=2) for t in (x, B))
    dt = dt.astype(jnp.float32)
    y, final = linear_attention(
        "simple_gla",
        C,
        B,
        (dt[..., None] * x).astype(x.dtype),
        g=dt * A.astype(jnp.float32),
        scale=1.0,
        initial_state=jnp.swapaxes(state, -1, -2),
        output_final_state=True,
        segment_ids=doc,
        impl=kernel,
    )
    if D is not None:
        y = (y + D.astype(jnp.float32)[:, None] * x).astype(x.dtype)
    return y, jnp.swapaxes(final, -1, -2)
