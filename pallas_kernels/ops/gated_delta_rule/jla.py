"""Adapter to the Hopper kernels of the package jax-linear-attention (`jla`, optional)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    doc: jax.Array | None,
    *,
    scale: float,
    kernel: str = "mosaic_gpu",
) -> tuple[jax.Array, jax.Array]:
    """Arguments as in the facade; `kernel` names the package's own implementation."""
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

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
