"""B'MOJO-F attention by cuDNN: two window passes merged; decoding as one pass over pieces.

With o_c, lse_c of the in-context pass and o_f, lse_f of the fading one (queries W on, keys W
earlier), the joint softmax is

    lse = log(exp(lse_c) + exp(lse_f)),   o = exp(lse_c - lse) o_c + exp(lse_f - lse) o_f.

A backward pass recomputes p_j = exp(s_j - lse) and needs do . o: with the joint lse and o instead
of a pass's own ones it returns that pass's part of the joint gradients, so two of them and a sum
are all there is to do.

jax.nn has no such backward pass and rounds the log-sum-exp; so this calls what lies below it, which
is not public: where it is missing or has changed, `why_not` says so.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import with_gradient_of
from hmf_jax.pallas_kernels.ops.attention import cudnn
from hmf_jax.pallas_kernels.ops.two_window_attention import chunked

_BACKWARD: Any = getattr(cudnn.internals, "_dot_product_attention_bwd_p_wrapper", None)
_RULE: Any = getattr(cudnn.internals, "_dot_product_attention_bwd_rule", None)
_HIDDEN = f"jax {jax.__version__} hides the cuDNN passes whose results could be merged"

Array = jax.Array


def why_not(
    q: Array, k: Array, v: Array, offset: Array | None, segment_ids: Array | None
) -> str | None:
    """Why cuDNN cannot run `two_window_attention` on these here, or None if it can."""
    if reason := cudnn.why_not(q, k, v, offset, segment_ids):
        return reason
    return _HIDDEN if None in (_BACKWARD, _RULE) else None


def two_window_attention(
    q: Array,
    k: Array,
    v: Array,
    k_fading: Array,
    v_fading: Array,
    q_fading: Array | None,
    offset: None,
    segment_ids: None,
    kv_lengths: Array | None,
    *,
    window: int,
    scale: float,
) -> Array:
    """`two_window_attention` over the queries' own tokens, without packing; see the facade."""
    q_fading = q if q_fading is None else q_fading
    arrays, valid = (q, k, v, k_fading, v_fading, q_fading), None
    if kv_lengths is not None:  # on the right, where no valid query looks; but it may hold NaN
        valid = (jnp.arange(q.shape[1]) < kv_lengths[:, None])[:, :, None, None]
        arrays = tuple(jnp.where(valid, x, 0) for x in arrays)
    o = _attend(window, scale, *arrays)
    return o if valid is None else jnp.where(valid, o, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, scale, q, k, v, k_fading, v_fading, q_fading):
    return _forward(window, scale, q, k, v, k_fading, v_fading, q_fading)[0]


def _forward(window, scale, *arrays):
    q, k, v, k_fading, v_fading, q_fading = arrays
    o, lse = cudnn.with_lse(q, k, v, window=window, scale=scale)
    early, late = q.shape[1] - window, slice(window, None)
    if early > 0:
        old, old_lse = cudnn.with_lse(
            q_fading[:, late], k_fading[:, :early], v_fading[:, :early], window=window, scale=scale
        )
        joint = jnp.logaddexp(lse[..., late], old_lse)  # [B, H, T - W]

        def weighted(o: Array, lse: Array) -> Array:
            return o.astype(jnp.float32) * jnp.swapaxes(jnp.exp(lse - joint), 1, 2)[..., None]

        both = weighted(o[:, late], lse[..., late]) + weighted(old, old_lse)
        o = jnp.concatenate([o[:, :window], both.astype(o.dtype)], axis=1)
        lse = jnp.concatenate([lse[..., :window], joint], axis=-1)
    return o, (arrays, o, lse)


def _backward(window, scale, saved, do):
    (q, k, v, k_fading, v_fading, q_fading), o, lse = saved
    dq, dk, dv = _pass_backward(q, k, v, lse, o, do, window, scale)
    early, late = q.shape[1] - window, slice(window, None)
    if early <= 0:
        return dq, dk, dv, *map(jnp.zeros_like, (k_fading, v_fading, q_fading))
    old = _pass_backward(
        q_fading[:, late], k_fading[:, :early], v_fading[:, :early],
        lse[..., late], o[:, late], do[:, late], window, scale,
    )  # fmt: skip
    before, after = [(0, 0), (window, 0), (0, 0), (0, 0)], [(0, 0), (0, window), (0, 0), (0, 0)]
    dq_fading, dk_fading, dv_fading = (
        jnp.pad(x, width) for x, width in zip(old, (before, after, after), strict=True)
    )
    return dq, dk, dv, dk_fading, dv_fading, dq_fading


_attend.defvjp(_forward, _backward)


def _pass_backward(
    q: Array, k: Array, v: Array, lse: Array, o: Array, do: Array, window: int, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v for p = exp(scale q . k - lse) and output o."""
    none = [jnp.zeros(0, q.dtype)] * 7  # no bias, lengths, offsets, pages
    new = {"score_mod": None} if "score_mod" in inspect.signature(_RULE).parameters else {}
    dq, dk, dv, *_ = _BACKWARD.bind(
        q, k, v, *none, lse, o, do.astype(o.dtype),
        scale=scale, seed=0, dropout_rate=0.0, variadic_args=(False, False),
        mask_type=cudnn.internals.MaskType.CAUSAL, sliding_window_length=window,
        layout=cudnn.internals.AttentionLayout.BTNH.value, **new,
    )  # fmt: skip
    return dq, dk, dv


def why_no_decode(q: Array, k: Array, v: Array, q_fading: Array | None) -> str | None:
    """Why cuDNN cannot run `two_window_decode` on these here, or None if it can."""
    if reason := cudnn.why_not(q, k, v):
        return reason
    return _HIDDEN if q_fading is not None and cudnn.internals is None else None


def two_window_decode(
    q: Array,
    k: Array,
    v: Array,
    lengths_in: Array,
    lengths_fading: Array,
    q_fading: Array | None,
    *,
    scale: float,
) -> Array:
    """`two_window_decode`: with tied weights plain attention over a prefix; see the facade."""
    if q_fading is None:
        return cudnn.decode_attention(q, k, v, lengths_in + lengths_fading, scale=scale)
    return with_gradient_of(
        functools.partial(chunked.two_window_decode, scale=scale),
        functools.partial(_untied, scale=scale),
        q, k, v, lengths_in, lengths_fading, q_fading,
    )  # fmt: skip


def _untied(q, k, v, lengths_in, lengths_fading, q_fading, *, scale):
    queries, lengths = jnp.stack([q, q_fading], 1), jnp.stack([lengths_in, lengths_fading], 1)
    return cudnn.decode_groups(queries, k, v, lengths, scale=scale)
