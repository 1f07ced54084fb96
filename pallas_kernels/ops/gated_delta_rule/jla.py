"""Adapter to the Hopper kernels of the package jax-linear-attention (`jla`, optional)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.gated_delta_rule.inputs import Inputs


def gated_delta_rule(
    inputs: Inputs, *, scale: float, kernel: str = "mosaic_gpu"
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.gated_delta_rule`; `kernel` names the package's own implementation."""
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

    q, k, v, g, beta, state, doc = inputs
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    o, final = linear_attention(
        "gated_deltanet",
        q,
        k,
        v,
        g=g.astype(jnp.float32),
        beta=beta.astype(jnp.float32),
        scale=scale,
        initial_state=state,
        output_final_state=True,
        segment_ids=doc,
        impl=kernel,
    )
    return o.astype(v.dtype), final
