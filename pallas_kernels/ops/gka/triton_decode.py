"""One token of GKA as one Triton kernel, for NVIDIA GPUs before Hopper."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.gka.inputs import Options, Result, Token
from hmf_jax.pallas_kernels.ops.gka.step import check_step, with_gradient
from hmf_jax.pallas_kernels.triton import jit, tl, triton_call


@jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, g_ptr, beta_ptr, num_iter_ptr, slots_ptr, h_kk_ptr, h_kv_ptr,
    o_ptr, new_kk_ptr, new_kv_ptr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, RIDGE: tl.constexpr, SCALE: tl.constexpr, DECAY_KK: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row. The states' inputs and outputs are the same memory."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    head = b * H + h
    slot = tl.load(slots_ptr + b).to(tl.int64)
    if slot < 0:
        tl.store(o_ptr + head * D + d, tl.zeros([D], o_ptr.dtype.element_ty))
    else:
        state = (slot * H + h) * D * D
        # The last term is 0, which the compiler cannot know: instead of four columns in a row it
        # gives every thread whole columns one by one, so that H z needs no sum across threads.
        tile = d[:, None] * D + d[None, :] + tl.minimum(slot, 0)
        h_kk = tl.load(h_kk_ptr + state + tile)
        q = tl.load(q_ptr + head * D + d).to(tl.float32)
        kv = (b * K + h // (H // K)) * D
        beta = tl.load(beta_ptr + head)
        k = tl.load(k_ptr + kv + d).to(tl.float32) * beta
        decay = tl.exp(tl.load(g_ptr + head))
        if DECAY_KK:
            h_kk = h_kk * decay
        h_kk += k[:, None] * k[None, :]
        tl.store(new_kk_ptr + state + tile, h_kk)

        f = tl.sqrt(tl.sum(tl.sum(h_kk * h_kk, 0), 0))
        inverse = tl.where(f > 0, 1 / tl.where(f > 0, f, 1.0), 0.0)
        STEP: tl.constexpr = 2 / (1 + 2 * RIDGE)
        CONTRACTION: tl.constexpr = (0.5 / (1 + 2 * RIDGE)) * (0.5 / (1 + 2 * RIDGE))
        z = STEP * q
        z_prev = tl.zeros_like(z)
        omega = 2.0
        num_iter = tl.load(num_iter_ptr + b)
        for _ in range(num_iter):
            omega = 1 / (1 - CONTRACTION * omega)
            residual = tl.sum(h_kk * z[:, None], 0) * inverse + RIDGE * z - q
            new = omega * (z - STEP * residual) - (omega - 1) * z_prev
            z_prev = z
            z = new
        blend = tl.where(num_iter > 0, q + tl.load(alpha_ptr + head) * (z * inverse - q), q)

        for first in range(0, D, E):  # columns of U in parts: registers are short
            e = first + tl.arange(0, E)
            part = state + d[:, None] * D + e[None, :]
            v = tl.load(v_ptr + kv + e).to(tl.float32) * beta
            h_kv = tl.load(h_kv_ptr + part) * decay + k[:, None] * v[None, :]
            tl.store(new_kv_ptr + part, h_kv)
            o = SCALE * tl.sum(h_kv * blend[:, None], 0)
            tl.store(o_ptr + head * D + e, o.to(o_ptr.dtype.element_ty))


def decode(token: Token, options: Options) -> Result:
    """One token per row, float32 inside; states are updated in place where they are donated.

    Args:
      token: q, k, v bfloat16 or float32; alpha, g, beta float32; S >= 1; slots given, < 0 where a
        row is inactive.

    Returns:
      o [B, H, D], dtype of v, 0 for inactive rows; and (h_kk, h_kv).
    """
    q, k, v, *_, h_kk, h_kv = token
    B, H, D = q.shape
    o, h_kk, h_kv = triton_call(
        *token,
        kernel=_decode_kernel,
        name="gka_decode",
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct(h_kk.shape, h_kk.dtype),
            jax.ShapeDtypeStruct(h_kv.shape, h_kv.dtype),
        ),
        input_output_aliases={8: 1, 9: 2},
        grid=(H, B),
        num_warps=4,
        num_stages=1,
        H=H,
        K=k.shape[1],
        D=D,
        E=32,
        RIDGE=options.ridge,
        SCALE=options.scale,
        DECAY_KK=options.decay_kk,
    )
    return o, (h_kk, h_kv)


def gka_decode(token: Token, options: Options) -> Result:
    """`decode` as `gka_step` wants it: any float gates, slots that may be None or too large, and
    the gradient of the chunked implementation."""
    check_step(token, options)
    return with_gradient(partial(_launch, options), options, token)


def _launch(options: Options, token: Token) -> Result:
    S, slots = token.h_kk.shape[0], token.slots
    alpha, g, beta = (x.astype(jnp.float32) for x in (token.alpha, token.g, token.beta))
    slots = jnp.arange(S) if slots is None else jnp.where(slots < S, slots, -1)
    token = token._replace(alpha=alpha, g=g, beta=beta, slots=slots.astype(jnp.int32))
    return decode(token, options)
