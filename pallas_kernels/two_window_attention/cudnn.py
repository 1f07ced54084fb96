"""B'MOJO-F attention by cuDNN: two window passes merged, and decoding with tied weights.

With o_c, lse_c of the in-context pass and o_f, lse_f of the fading one (queries W on, keys W
earlier), the joint softmax is

    lse = log(exp(lse_c) + exp(lse_f)),   o = exp(lse_c - lse) o_c + exp(lse_f - lse) o_f.

A backward pass recomputes p_j = exp(s_j - lse) and needs do . o: with the joint lse and o instead
of a pass's own ones it returns that pass's part of the joint gradients, so two of them and a sum
are all there is to do.

jax.nn rounds the log-sum-exp to the dtype of the values, too coarse to merge with, and drops its
gradient; so this calls what lies below it, which is not public: where it is missing or has changed,
`why_not` says so.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn

try:
    from jax._src.cudnn import fused_attention_stablehlo as _internals

    _BACKWARD: Any = _internals._dot_product_attention_bwd_p_wrapper
    _PARAMETERS = inspect.signature(_internals._dot_product_attention_bwd_rule).parameters
except (ImportError, AttributeError):  # another jax
    _internals = None

Array = jax.Array


def why_not(
    q: Array, k: Array, v: Array, offset: Array | None, segment_ids: Array | None
) -> str | None:
    """Why cuDNN cannot run `two_window_attention` on these here, or None if it can."""
    if reason := cudnn.why_not(q, k, v, offset, segment_ids):
        return reason
    if _internals is None:
        return f"jax {jax.__version__} hides the cuDNN passes whose results could be merged"
    return None


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
    o, lse = _pass(q, k, v, window, scale)
    early, late = q.shape[1] - window, slice(window, None)
    if early > 0:
        old, old_lse = _pass(
            q_fading[:, late], k_fading[:, :early], v_fading[:, :early], window, scale
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


def _pass(q: Array, k: Array, v: Array, window: int, scale: float) -> tuple[Array, Array]:
    """Causal attention over `window` keys: o and its log-sum-exp, float32 [B, H, T]."""
    assert _internals is not None
    found: Any = _internals.dot_product_attention(
        q, k, v,
        scale=scale, mask_type=_internals.MaskType.CAUSAL, sliding_window_length=window,
        return_residual=True,
    )  # fmt: skip
    return found


def _pass_backward(
    q: Array, k: Array, v: Array, lse: Array, o: Array, do: Array, window: int, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v for p = exp(scale q . k - lse) and output o."""
    assert _internals is not None
    none = [jnp.zeros(0, q.dtype)] * 7  # no bias, lengths, offsets, pages
    new = {"score_mod": None} if "score_mod" in _PARAMETERS else {}
    dq, dk, dv, *_ = _BACKWARD.bind(
        q, k, v, *none, lse, o, do.astype(o.dtype),
        scale=scale, seed=0, dropout_rate=0.0, variadic_args=(False, False),
        mask_type=_internals.MaskType.CAUSAL, layout=_internals.AttentionLayout.BTNH.value,
        sliding_window_length=window, **new,
    )  # fmt: skip
    return dq, dk, dv


def why_no_decode(q: Array, k: Array, v: Array, q_fading: Array | None) -> str | None:
    """Why cuDNN cannot run `two_window_decode` on these here, or None if it can."""
    if q_fading is not None:
        return "cuDNN cannot score two sets of keys with two queries (q_fading is given)"
    return cudnn.why_not(q, k, v)


def two_window_decode(
    q: Array,
    k: Array,
    v: Array,
    lengths_in: Array,
    lengths_fading: Array,
    q_fading: None,
    *,
    scale: float,
) -> Array:
    """`two_window_decode` with tied weights, one plain attention over a prefix; see the facade."""
    return cudnn.decode_attention(q, k, v, lengths_in + lengths_fading, scale=scale)
