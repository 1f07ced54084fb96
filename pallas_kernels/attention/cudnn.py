"""cuDNN flash attention through jax.nn.dot_product_attention, where it can express the mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def why_not(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> str | None:
    """Why cuDNN cannot take these arguments on this backend, or None if it can."""
    if offset is not None:
        return "cuDNN cannot align queries with the end of a cache (offset is given)"
    if segment_ids is not None:
        return "cuDNN would need a dense mask for segment_ids"
    if jax.default_backend() != "gpu":
        return f"cuDNN needs an NVIDIA GPU, the backend is {jax.default_backend()}"
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if not capability.replace(".", "").isdigit() or float(capability) < 8.0:
        return f"cuDNN attention needs compute capability 8.0, this is {capability or 'unknown'}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs bfloat16 or float16 throughout, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"cuDNN needs a head_dim of at most 128 that 8 divides, got {q.shape[-1]}"
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: None,
    segment_ids: None,
    kv_lengths: jax.Array | None,
    *,
    window: int | None,
    past: None,
    scale: float,
) -> jax.Array:
    """`attention` over the queries' own tokens, without packing; see the facade."""
    valid = None
    if kv_lengths is not None:
        # Under a causal mask no valid query sees padding on the right, so cuDNN need not know of
        # it; but whatever lies there must not reach a matrix product, forward or backward.
        valid = (jnp.arange(q.shape[1]) < kv_lengths[:, None])[:, :, None, None]
        q, k, v = (jnp.where(valid, x, 0) for x in (q, k, v))
    o = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,  # a local window of (w, 0) alone would see the future
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return o if valid is None else jnp.where(valid, o, 0)


def decode_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    """`decode_attention`; see the facade."""
    o = jax.nn.dot_product_attention(
        q[:, None],
        k,
        v,
        scale=scale,
        key_value_seq_lengths=lengths.astype(jnp.int32),
        implementation="cudnn",
    )
    return jnp.where((lengths > 0)[:, None, None], o[:, 0], 0)
