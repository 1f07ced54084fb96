"""Gated KalmaNet, token by token: the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hmf_jax.pallas_kernels.segments import documents


def gka_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    num_iter: jax.Array | np.ndarray,
    segment_ids: jax.Array | None,
    h_kk: jax.Array,
    h_kv: jax.Array,
    *,
    ridge: float,
    scale: float,
    decay_kk: bool,
    bp_lambda: bool,
    solver: str,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """See `pallas_kernels.gka`: same shapes, everything given, num_iter [B].

    The states set the dtype of the computation. Gradients are those of the truncated Chebyshev
    iteration, and exist only for a concrete `num_iter`; solver "cg" has implicit ones.
    """
    solve = {"chebyshev": _chebyshev, "cg": _cg}[solver]
    B, T, H, _ = q.shape
    acc, out_dtype = h_kk.dtype, v.dtype
    q, k, v, alpha, g, beta = (x.astype(acc) for x in (q, k, v, alpha, g, beta))
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) * beta[..., None] for x in (k, v))
    doc, valid = documents(jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids)

    def token(carry, inputs):
        h_before, u_before, doc_before = carry
        q_t, k_t, v_t, alpha_t, g_t, doc_t, valid_t = inputs
        new_document = (doc_t != doc_before)[:, None, None, None]
        decay = jnp.exp(g_t)[..., None, None]
        h = (decay if decay_kk else 1) * jnp.where(new_document, 0, h_before)
        h = h + k_t[..., :, None] * k_t[..., None, :]
        u = decay * jnp.where(new_document, 0, u_before) + k_t[..., :, None] * v_t[..., None, :]
        x = solve(h, q_t, num_iter, ridge, bp_lambda)
        blend = q_t + alpha_t[..., None] * (x - q_t)
        blend = jnp.where((num_iter > 0)[:, None, None], blend, q_t)
        o = scale * jnp.einsum("bhd,bhde->bhe", blend, u)
        keep = ~valid_t[:, None, None, None]
        return (jnp.where(keep, h_before, h), jnp.where(keep, u_before, u), doc_t), o

    tokens = tuple(x.swapaxes(0, 1) for x in (q, k, v, alpha, g, doc, valid))
    (h_kk, h_kv, _), o = jax.lax.scan(token, (h_kk, h_kv, jnp.zeros(B, jnp.int32)), tokens)
    return o.swapaxes(0, 1).astype(out_dtype), (h_kk, h_kv)


def _chebyshev(
    h: jax.Array, q: jax.Array, num_iter: jax.Array | np.ndarray, ridge: float, bp_lambda: bool
) -> jax.Array:
    """Chebyshev iteration on [lambda, lambda + f] for (H + lambda I) x = q, f = ||H||_F."""
    f2 = jnp.sum(h * h, axis=(-2, -1))[..., None]
    nonzero = f2 > 0
    f = jnp.sqrt(jnp.where(nonzero, f2, 1))
    f = f if bp_lambda else jax.lax.stop_gradient(f)
    lam = ridge * f
    step = 2 / (2 * lam + f)
    c4 = (0.5 * f / (2 * lam + f)) ** 2

    def iterate(n, carry):
        x, x_prev, omega = carry
        omega = 1 / (1 - c4 * omega)
        residual = jnp.einsum("bhde,bhe->bhd", h, x) + lam * x - q
        new = omega * x - (step * omega * residual + (omega - 1) * x_prev)
        on = (n < num_iter)[:, None, None]
        return jnp.where(on, new, x), jnp.where(on, x, x_prev), omega

    traced = isinstance(num_iter, Tracer)
    count = jnp.max(num_iter) if traced else int(np.max(num_iter))
    carry = (step * q, jnp.zeros_like(q), jnp.full_like(f, 2))
    x, _, _ = jax.lax.fori_loop(0, count, iterate, carry)
    return jnp.where(nonzero, x, 0)


def _cg(
    h: jax.Array, q: jax.Array, num_iter: jax.Array | np.ndarray, ridge: float, bp_lambda: bool
) -> jax.Array:
    """Conjugate gradients from 0 for (H + lambda I) x = q, until the residual is below rounding.

    The gradient is that of the exact solution: that of a converged iteration would be 0 / 0.
    """
    f2 = jnp.sum(h * h, axis=(-2, -1))[..., None]
    nonzero = f2 > 0
    f = jnp.sqrt(jnp.where(nonzero, f2, 1))
    lam = ridge * (f if bp_lambda else jax.lax.stop_gradient(f))

    def dot(x, y):
        return jnp.sum(x * y, axis=-1, keepdims=True)

    def matvec(x):
        return jnp.einsum("bhde,bhe->bhd", h, x) + lam * x

    def solve(matvec, b):
        size = jnp.max(jnp.abs(b), axis=-1, keepdims=True)
        b = b / jnp.where(size > 0, size, 1)

        def iterate(n, carry):
            x, r, p = carry
            ap, rr = matvec(p), dot(r, r)
            on = (n < num_iter)[:, None, None] & (rr > (0.01 * jnp.finfo(b.dtype).eps) ** 2)
            step = jnp.where(on, rr / jnp.where(on, dot(p, ap), 1), 0)
            x, r = x + step * p, r - step * ap
            return x, r, r + jnp.where(on, dot(r, r) / jnp.where(on, rr, 1), 0) * p

        carry = (jnp.zeros_like(b), b, b)
        return size * jax.lax.fori_loop(0, jnp.max(num_iter), iterate, carry)[0]

    x = jax.lax.custom_linear_solve(matvec, q, solve, symmetric=True)
    return jnp.where(nonzero, x, 0)
