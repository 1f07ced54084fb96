"""Gated KalmaNet, token by token: the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.pallas_kernels.compat import is_traced
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options, Result


def gka_reference(inputs: Inputs, options: Options, *, solver: str) -> Result:
    """See `pallas_kernels.gka`.

    Gradients are those of the truncated Chebyshev iteration, and exist only for a concrete
    `num_iter`; solver "cg" has implicit ones.
    """
    solve = {"chebyshev": _chebyshev, "cg": _cg}[solver]
    ridge, scale, decay_kk, bp_lambda = options
    B, T, H, _ = inputs.q.shape
    acc, out_dtype, num_iter = inputs.h_kk.dtype, inputs.v.dtype, inputs.num_iter
    q, k, v, alpha, g, beta = (a.astype(acc) for a in inputs[:6])
    k, v = (jnp.repeat(a, H // a.shape[2], axis=2) * beta[..., None] for a in (k, v))
    doc = jnp.zeros((B, T), jnp.int32) if inputs.doc is None else inputs.doc

    def token(carry, arrays):
        h_before, u_before, doc_before = carry
        q_t, k_t, v_t, alpha_t, g_t, doc_t = arrays
        new_document = (doc_t != doc_before)[:, None, None, None]
        decay = jnp.exp(g_t)[..., None, None]
        h = (decay if decay_kk else 1) * jnp.where(new_document, 0, h_before)
        h = h + k_t[..., :, None] * k_t[..., None, :]
        u = decay * jnp.where(new_document, 0, u_before) + k_t[..., :, None] * v_t[..., None, :]
        solution = solve(h, q_t, num_iter, ridge, bp_lambda)
        blend = q_t + alpha_t[..., None] * (solution - q_t)
        blend = jnp.where((num_iter > 0)[:, None, None], blend, q_t)
        o = scale * jnp.einsum("bhd,bhde->bhe", blend, u)
        return (h, u, doc_t), o

    tokens = tuple(a.swapaxes(0, 1) for a in (q, k, v, alpha, g, doc))
    start = (inputs.h_kk, inputs.h_kv, jnp.zeros(B, jnp.int32))
    (h_kk, h_kv, _), o = jax.lax.scan(token, start, tokens)
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

    count = jnp.max(num_iter) if is_traced(num_iter) else int(np.max(num_iter))
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
