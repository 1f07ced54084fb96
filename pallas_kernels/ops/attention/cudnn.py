"""cuDNN flash attention through jax.nn.dot_product_attention, where it can express the mask.

Decoding cuts long buffers into pieces, each a row to cuDNN, and merges what they return: with a few
hundred blocks, one per (row, kv head), a GPU idles while the last of them run.

That needs the log-sum-exp of every piece, which jax.nn rounds to the dtype of the values, too
coarse to merge with; so `with_lse` calls what lies below jax.nn and is not public. A jax that has
changed it (`internals` is None) decodes in one piece.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.compat import compute_capability, find_cudnn
from hmf_jax.pallas_kernels.dispatch import with_gradient_of
from hmf_jax.pallas_kernels.ops.attention import chunked
from hmf_jax.pallas_kernels.ops.attention.inputs import Inputs, Token
from hmf_jax.pallas_kernels.segments import leading

internals = find_cudnn()


def why_not(inputs: Inputs | Token) -> str | None:
    """Why cuDNN cannot take these arguments on this backend, or None if it can."""
    if getattr(inputs, "offset", None) is not None:
        return "cuDNN cannot align queries with the end of a cache (offset is given)"
    if getattr(inputs, "segment_ids", None) is not None:
        return "cuDNN would need a dense mask for segment_ids"
    q, k, v = inputs[:3]
    if jax.default_backend() != "gpu":
        return f"cuDNN needs an NVIDIA GPU, the backend is {jax.default_backend()}"
    capability = compute_capability()
    if not capability.replace(".", "").isdigit() or float(capability) < 8.0:
        return f"cuDNN attention needs compute capability 8.0, this is {capability or 'unknown'}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs bfloat16 or float16 throughout, got {q.dtype}, {k.dtype}, {v.dtype}"
    dim = q.shape[-1]
    if dim == 256 and float(capability) < 9.0:
        return "cuDNN takes head_dim 256 since compute capability 9.0"
    if dim != 256 and (dim > 128 or dim % 8):
        return f"cuDNN takes head_dim 256 and multiples of 8 up to 128, got {dim}"
    return None


def attention(inputs: Inputs, *, window: int | None, past: None, scale: float) -> jax.Array:
    """`pallas_kernels.attention` over the queries' own tokens, without packing."""
    q, k, v, *_, lengths = inputs
    valid = None
    if lengths is not None:
        # Under a causal mask no valid query sees padding on the right, so cuDNN need not know of
        # it; but whatever lies there must not reach a matrix product, forward or backward.
        valid = leading(lengths, q.shape[1])[:, :, None, None]
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


def with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention, or with `lengths` [B] attention to so many keys, and its log-sum-exp.

    q [B, T, H, D], k, v [B, S, K, D] -> o [B, T, H, D], lse float32 [B, H, T]. The gradient ignores
    lse. Rows of length 0 hold anything.
    """
    types = internals.MaskType
    found: Any = internals.dot_product_attention(
        q, k, v,
        scale=scale,
        mask_type=types.CAUSAL if lengths is None else types.PADDING,
        sliding_window_length=window,
        q_seqlen=None if lengths is None else jnp.full(q.shape[0], q.shape[1], jnp.int32),
        kv_seqlen=lengths,
        return_residual=True,
    )  # fmt: skip
    return found


def decode_attention(token: Token, *, scale: float) -> jax.Array:
    """`pallas_kernels.decode_attention`."""
    q, k, v, lengths = token
    if internals is not None and _pieces(*k.shape[:3], groups=1) > 1:
        pieces = partial(_decode_in_pieces, scale=scale)
        return with_gradient_of(partial(chunked.decode_attention, scale=scale), pieces, token)
    o = jax.nn.dot_product_attention(
        q[:, None],
        k,
        v,
        scale=scale,
        key_value_seq_lengths=lengths.astype(jnp.int32),
        implementation="cudnn",
    )
    return jnp.where((lengths > 0)[:, None, None], o[:, 0], 0)


def _decode_in_pieces(token: Token, *, scale: float) -> jax.Array:
    q, k, v, lengths = token
    return decode_groups(q[:, None], k, v, lengths[:, None], scale=scale)


def decode_groups(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    """One softmax over G groups of keys, with a query for each. Its gradient is not right.

    Args:
      q: [B, G, H, D].
      k, v: [B, G * S, K, D]; group g is the entries g * S .. (g + 1) * S - 1.
      lengths: [B, G], leading entries of each group that are in use.
      scale: factor of the scores.

    Returns:
      [B, H, D], zero where nothing is in use.
    """
    B, G, H, D = q.shape
    P = _pieces(*k.shape[:3], groups=G)
    size = k.shape[1] // P
    start = size * jnp.arange(P // G, dtype=jnp.int32)
    used = jnp.clip(lengths.astype(jnp.int32)[:, :, None] - start, 0, size).reshape(B * P)
    o, lse = with_lse(
        jnp.repeat(q, P // G, axis=1).reshape(B * P, 1, H, D),
        *(x.reshape(B * P, size, -1, D) for x in (k, v)),
        scale=scale,
        lengths=used,
    )
    used = (used > 0).reshape(B, P, 1)
    lse = jnp.where(used, lse.reshape(B, P, H), -jnp.inf)
    share = jnp.where(used, jax.nn.softmax(lse, axis=1), 0)[..., None]
    parts = jnp.where(used[..., None], o.reshape(B, P, H, D).astype(jnp.float32), 0)
    return jnp.sum(share * parts, axis=1).astype(v.dtype)


def _pieces(rows: int, entries: int, heads: int, *, groups: int) -> int:
    """Into how many equal pieces, a multiple of `groups`, to cut buffers [rows, entries, heads, D].

    cuDNN has a block for each (piece, head), two to a multiprocessor: H100s and H200s run 264 at a
    time, and idle while the last ones run. So there should be four rounds of them; more cost more
    than they save, and so do pieces of less than 2048 entries: rather none then (cuDNN cuts few
    rows by itself). On an H200 (benchmarks/results) 376 blocks took 7% longer than 1504, 192 6%
    longer than 1536, 120 5% less than 960; 752, where the last round is nearly full, 3% less than
    1504, but with rows of different lengths (1024 to 8192) 512 took 9% longer than 2048.
    """
    blocks = rows * heads * groups
    times = 1
    while 0 < blocks * times < 1100:
        times *= 2
    pieces = groups * times
    return pieces if entries % pieces == 0 and entries // pieces >= 2048 else groups
