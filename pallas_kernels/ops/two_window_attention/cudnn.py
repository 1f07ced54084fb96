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

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.compat import find_cudnn_backward
from hmf_jax.pallas_kernels.dispatch import kept, with_gradient_of
from hmf_jax.pallas_kernels.ops.attention import cudnn
from hmf_jax.pallas_kernels.ops.attention import inputs as attention_inputs
from hmf_jax.pallas_kernels.ops.two_window_attention import chunked
from hmf_jax.pallas_kernels.ops.two_window_attention.inputs import Inputs, Token
from hmf_jax.pallas_kernels.segments import leading

_backward_pass = find_cudnn_backward()
_HIDDEN = f"jax {jax.__version__} hides the cuDNN passes whose results could be merged"

Array = jax.Array


def why_not(inputs: Inputs) -> str | None:
    """Why cuDNN cannot run `two_window_attention` on these here, or None if it can."""
    plain = attention_inputs.Inputs(*inputs[:3], inputs.offset, inputs.segment_ids)
    if reason := cudnn.why_not(plain) or _mixed(inputs):
        return reason
    return _HIDDEN if _backward_pass is None else None


def _mixed(inputs: Inputs | Token) -> str | None:
    """Why cuDNN cannot take the fading arrays beside the others, or None if it can."""
    fading = (getattr(inputs, f"{name}_fading", None) for name in "qkv")
    dtypes = {str(x.dtype) for x in (inputs.q, *fading) if x is not None}
    return f"cuDNN needs one dtype, got {', '.join(sorted(dtypes))}" if len(dtypes) > 1 else None


def two_window_attention(inputs: Inputs, *, window: int, scale: float) -> Array:
    """`pallas_kernels.two_window_attention` over the queries' own tokens, without packing."""
    q, k, v, k_fading, v_fading, q_fading, _, _, lengths = inputs
    q_fading = q if q_fading is None else q_fading
    arrays, valid = (q, k, v, k_fading, v_fading, q_fading), None
    if lengths is not None:  # on the right, where no valid query looks; but it may hold NaN
        valid = leading(lengths, q.shape[1])[:, :, None, None]
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
    o, lse = kept((o, lse))
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
    assert _backward_pass is not None
    return _backward_pass(q, k, v, lse, o, do, window=window, scale=scale)


def why_no_decode(token: Token) -> str | None:
    """Why cuDNN cannot run `two_window_decode` on these here, or None if it can."""
    if reason := cudnn.why_not(_plain(token)) or _mixed(token):
        return reason
    return _HIDDEN if token.q_fading is not None and cudnn.internals is None else None


def two_window_decode(token: Token, *, scale: float) -> Array:
    """`pallas_kernels.two_window_decode`: with tied weights plain attention over a prefix."""
    if token.q_fading is None:
        return cudnn.decode_attention(_plain(token), scale=scale)
    exact = functools.partial(chunked.two_window_decode, scale=scale)
    return with_gradient_of(exact, functools.partial(_untied, scale=scale), token)


def _plain(token: Token) -> attention_inputs.Token:
    lengths = token.lengths_in + token.lengths_fading
    return attention_inputs.Token(token.q, token.k, token.v, lengths)


def _untied(token: Token, *, scale: float) -> Array:
    assert token.q_fading is not None
    queries = jnp.stack([token.q, token.q_fading], 1)
    lengths = jnp.stack([token.lengths_in, token.lengths_fading], 1)
    return cudnn.decode_groups(queries, token.k, token.v, lengths, scale=scale)
