"""B'MOJO-F attention: the last W tokens, and fading summaries of the W before them, in one softmax.

Query i sees the in-context keys (i - W, i] and the fading keys (i - 2W, i - W]; its output is the
softmax over the union of both (B'MOJO, Zancato et al. 2024; here as in Hybrid Model Factory's
B'MOJO-F layer).
"""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import sharded
from hmf_jax.pallas_kernels.dispatch import check_whole, finite, resolve
from hmf_jax.pallas_kernels.ops.attention.api import (
    check_alignment,
    check_heads,
    check_ndim,
    check_rows,
)
from hmf_jax.pallas_kernels.ops.two_window_attention import chunked, cudnn, mosaic, reference
from hmf_jax.pallas_kernels.ops.two_window_attention.inputs import Inputs, Token

__all__ = ["two_window_attention", "two_window_decode"]

_IMPLS = {"mosaic": mosaic, "cudnn": cudnn, "chunked": chunked, "reference": reference}


def two_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_fading: jax.Array,
    v_fading: jax.Array,
    *,
    window: int,
    q_fading: jax.Array | None = None,
    offset: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Joint softmax over the in-context and the fading window of every token.

    Without `offset` all keys are those of the T own tokens. With it, each of the two key arrays
    holds older tokens in chronological order and then the T new ones; the number of older ones is
    its length minus T. To continue exactly, keep at least the last W - 1 in-context and 2W - 1
    fading ones (or all, if there are fewer); entries before token 0 are ignored.

    Args:
      q: [B, T, H, D] queries; any T >= 1.
      k, v: [B, P + T, K, D] in-context keys and values; K divides H.
      k_fading, v_fading: [B, P' + T, K, D] fading keys and values.
      window: W, keys per window; counts tokens of the row.
      q_fading: [B, T, H, D] queries of the fading window; None if its weights are tied (q).
      offset: [B] integers, token index of each row's first query; None means P == P' == 0.
      segment_ids: [B, T] integers, 0 = padding, a change starts a new document, which isolates
        both windows; not with `offset`.
      lengths: [B] integers, leading tokens that are valid; not with `offset`.
      scale: factor of the scores; D ** -0.5 by default.
      impl: "auto", "mosaic" (NVIDIA Hopper, bfloat16, D 64 or 128, positive scale; one kernel for
        both windows), "cudnn" (NVIDIA, 16-bit, D <= 128, on Hopper also 256, own tokens, no
        segment_ids: a pass per window, merged), "chunked" (any device, memory linear in T) or
        "reference" (dense).
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`) or None.

    Returns:
      [B, T, H, D] in the dtype of v; zero at padding. The softmax is float32 (float64 for float64
      inputs). Reverse-mode differentiable in all queries, keys and values.

    Raises:
      ValueError: shapes that do not fit, packing together with `offset`, an `impl` that cannot run.
    """
    check_whole("two_window_attention", "window", window)
    scale = finite("two_window_attention", "scale", scale, q.shape[-1] ** -0.5)
    check_heads(q, k, v)
    check_heads(q, k_fading, v_fading, ("q", "k_fading", "v_fading"))
    _check_fading(q, q_fading)
    if k_fading.shape[2] != k.shape[2]:
        raise ValueError(
            f"k_fading must have the {k.shape[2]} heads of k, got shape {k_fading.shape}."
        )
    for name, key in (("k", k), ("k_fading", k_fading)):
        past = None if offset is None else key.shape[1] - q.shape[1]
        check_alignment(q, key, offset, segment_ids, lengths, past, name)
    inputs = Inputs(q, k, v, k_fading, v_fading, q_fading, offset, segment_ids, lengths)
    usable = {
        "mosaic": mosaic.why_not(scale, q, k, v, k_fading, v_fading, q_fading),
        "cudnn": cudnn.why_not(inputs),
        "chunked": None,
        "reference": None,
    }
    run = _IMPLS[resolve("two_window_attention", impl, usable)].two_window_attention
    return sharded.run(partial(run, window=window, scale=scale), mesh, inputs, "bthd")


def two_window_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths_in: jax.Array,
    lengths_fading: jax.Array,
    *,
    q_fading: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """One token per row against a buffer [in-context ring (W) | readable fading ring (W)].

    When token i has been written, the in-context ring holds the tokens (i - W, i] and the fading
    ring the fading entries (i - 2W, i - W], in any order: lengths_in = min(i + 1, W) and
    lengths_fading = clip(i - W + 1, 0, W). Fading entries may only exist when the in-context ring
    is full; so the entries in use are a prefix, and with tied weights this is plain attention.

    Args:
      q: [B, H, D] queries.
      k, v: [B, 2W, K, D] buffers, the new token included; K divides H.
      lengths_in, lengths_fading: [B] integers, entries in use in each half.
      q_fading: [B, H, D] queries of the fading window; None if its weights are tied (q).
      scale: factor of the scores; D ** -0.5 by default.
      impl: "auto", "cudnn" (NVIDIA, 16-bit, D as in `attention`), "chunked" or "reference".
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`) or None.

    Returns:
      [B, H, D] in the dtype of v; zero where both lengths are 0.

    Raises:
      ValueError: shapes that do not fit, an `impl` that cannot run.
    """
    check_ndim("q", q, 3, "[B, H, D]")
    check_heads(q[:, None], k, v)
    if k.shape[1] % 2:
        raise ValueError(f"k must hold two rings of equal size, [B, 2W, K, D], got {k.shape}.")
    check_rows("lengths_in", lengths_in, q.shape[0])
    check_rows("lengths_fading", lengths_fading, q.shape[0])
    _check_fading(q, q_fading)
    scale = finite("two_window_decode", "scale", scale, q.shape[-1] ** -0.5)
    token = Token(q, k, v, lengths_in, lengths_fading, q_fading)
    usable = {"cudnn": cudnn.why_no_decode(token), "chunked": None, "reference": None}
    run = _IMPLS[resolve("two_window_decode", impl, usable)].two_window_decode
    return sharded.run(partial(run, scale=scale), mesh, token, "bhd")


def _check_fading(q: jax.Array, q_fading: jax.Array | None) -> None:
    if q_fading is not None and q_fading.shape != q.shape:
        raise ValueError(f"q_fading must have the shape of q, {q.shape}, got {q_fading.shape}.")
