"""Gated KalmaNet in chunks: plain jnp, any device, differentiable.

Shapes below use n chunks of c tokens (i, j index tokens of one chunk), b rows, h query heads,
d = e = head_dim, pair [n, b, h, i, j] and start [n, b, h, i] the decays of `chunk_decays`. Chunks
are independent given the states at their starts, [n, b, h, d, e], so a scan makes those and
everything else is batched over n. Per-token states are never formed.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.pallas_kernels.dispatch import kept
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options, Result
from hmf_jax.pallas_kernels.recurrent import decays, from_chunks, to_chunks


def gka_chunked(inputs: Inputs, options: Options, *, solver: str, chunk_size: int) -> Result:
    """See `pallas_kernels.gka`."""
    ridge, scale, decay_kk, bp_lambda = options
    T, doc, num_iter = inputs.q.shape[1], inputs.doc, inputs.num_iter
    acc, out_dtype = inputs.h_kk.dtype, inputs.v.dtype
    split = partial(to_chunks, chunk=min(chunk_size, T))
    q, alpha, g, beta = (a.astype(acc) for a in (inputs.q, inputs.alpha, inputs.g, inputs.beta))
    k, v = (split(scaled(a, beta)) for a in (inputs.k, inputs.v))
    q, alpha, g = split(q), split(alpha), split(g)
    pair, start = chunk_decays(g, doc)
    pair_kk, start_kk = (pair, start) if decay_kk else chunk_decays(jnp.zeros_like(g), doc)

    states, h_kk = chunk_states(k, k, pair_kk, start_kk, inputs.h_kk)
    solution = _solve(ridge, bp_lambda, solver, q, k, pair_kk, start_kk, states, num_iter)
    states, h_kv = chunk_states(k, v, pair, start, inputs.h_kv)
    o = scale * readout(q, solution, alpha, num_iter, k, v, pair, start, states)
    return from_chunks(o[:, :, :, None], T).astype(out_dtype), (h_kk, h_kv)


def scaled(k: jax.Array, beta: jax.Array) -> jax.Array:
    """beta k of every query head, [B, T, H, D], from k [B, T, K, D] and beta [B, T, H]."""
    return beta[..., None] * jnp.repeat(k.astype(beta.dtype), beta.shape[2] // k.shape[2], axis=2)


def chunk_decays(g: jax.Array, doc: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """exp of sums of g: `pair` from token j to token i, `start` from the start state to token i."""
    pair, start = decays(g[:, :, :, None], doc)
    return pair[:, :, :, 0], start[:, :, :, 0]


def readout(
    q: jax.Array,
    x: jax.Array,
    alpha: jax.Array,
    num_iter: jax.Array | np.ndarray,
    k: jax.Array,
    v: jax.Array,
    pair: jax.Array,
    start: jax.Array,
    states: jax.Array,
) -> jax.Array:
    """U_i^T (q_i + alpha_i (x_i - q_i)), or U_i^T q_i in rows without iterations."""
    solved = (num_iter > 0)[None, :, None, None, None]
    q = jnp.where(solved, q + alpha[..., None] * (x - q), q)
    score = pair * jnp.einsum("nbhid,nbhjd->nbhij", q, k)
    o = start[..., None] * jnp.einsum("nbhid,nbhde->nbhie", q, states)
    return o + jnp.einsum("nbhij,nbhje->nbhie", score, v)


def chunk_states(
    k: jax.Array, v: jax.Array, pair: jax.Array, start: jax.Array, initial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """States of S_t = exp(g_t) S_{t-1} + k_t v_t^T at the starts of chunks, and the last one."""

    def chunk(state, inputs):
        k_bhjd, v_bhje, whole = inputs
        new = whole[..., None, None] * state + jnp.einsum("bhjd,bhje->bhde", k_bhjd, v_bhje)
        return new, state

    # The last row of `pair` and the last entry of `start` decay to the end of the chunk.
    final, states = jax.lax.scan(chunk, initial, (pair[..., -1, :, None] * k, v, start[..., -1]))
    return states, final


def _times(
    x: jax.Array, k: jax.Array, pair: jax.Array, start: jax.Array, states: jax.Array
) -> jax.Array:
    """H_i x_i for every token, [n, b, h, i, d], with x like k."""
    score = pair * jnp.einsum("nbhid,nbhjd->nbhij", x, k)
    return start[..., None] * jnp.einsum("nbhie,nbhde->nbhid", x, states) + jnp.einsum(
        "nbhij,nbhjd->nbhid", score, k
    )


def _norm(k: jax.Array, pair: jax.Array, start: jax.Array, states: jax.Array) -> jax.Array:
    """||H_i||_F for every token, [n, b, h, i]; with a zero gradient where it is 0.

    H_i = a S + sum_j M_ij k_j k_j^T, so
    ||H_i||^2 = a^2 ||S||^2 + 2 a sum_j M_ij k_j^T S k_j + sum_jl M_ij M_il (k_j . k_l)^2.
    """
    square = jnp.sum(states * states, axis=(-2, -1))[..., None]
    quadratic = jnp.sum(jnp.einsum("nbhjd,nbhde->nbhje", k, states) * k, axis=-1)
    gram = jnp.einsum("nbhjd,nbhld->nbhjl", k, k)
    f2 = start * start * square
    f2 += 2 * start * jnp.einsum("nbhij,nbhj->nbhi", pair, quadratic)
    f2 += jnp.sum(pair * jnp.einsum("nbhij,nbhjl->nbhil", pair, gram * gram), axis=-1)
    positive = f2 > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, f2, 1)), 0)


def _chebyshev(
    b: jax.Array,
    k: jax.Array,
    pair: jax.Array,
    start: jax.Array,
    states: jax.Array,
    f: jax.Array,
    num_iter: jax.Array,
    ridge: float,
) -> jax.Array:
    """x_i ~ (H_i + ridge f_i I)^-1 b_i by num_iter [b] Chebyshev steps; 0 where f is 0.

    Works on z = f x and H / f, whose spectrum lies in [0, 1]: step sizes depend on ridge only.
    """
    inverse = jnp.where(f > 0, 1 / jnp.where(f > 0, f, 1), 0)
    pair, start = pair * inverse[..., None], start * inverse
    step = 2 / (1 + 2 * ridge)
    contraction = (0.5 / (1 + 2 * ridge)) ** 2

    def iterate(n, carry):
        z, z_prev, omega = carry
        omega = 1 / (1 - contraction * omega)
        residual = _times(z, k, pair, start, states) + ridge * z - b
        new = omega * (z - step * residual) - (omega - 1) * z_prev
        return jnp.where((n < num_iter)[None, :, None, None, None], new, z), z, omega

    carry = (step * b, jnp.zeros_like(b), jnp.asarray(2, b.dtype))
    z, _, _ = jax.lax.fori_loop(0, jnp.max(num_iter), iterate, carry)
    return z * inverse[..., None]


def _cg(
    b: jax.Array,
    k: jax.Array,
    pair: jax.Array,
    start: jax.Array,
    states: jax.Array,
    f: jax.Array,
    num_iter: jax.Array,
    ridge: float,
) -> jax.Array:
    """The same x_i by num_iter [b] steps of conjugate gradients from 0, which need no interval.

    Works on H / f like `_chebyshev`, and on b / max|b|, so that sums of squares neither overflow
    nor vanish whatever the size of keys and cotangents. A token whose residual is below rounding
    stays where it is: its next step would be a ratio of rounding errors.
    """
    inverse = jnp.where(f > 0, 1 / jnp.where(f > 0, f, 1), 0)
    pair, start = pair * inverse[..., None], start * inverse
    size = jnp.max(jnp.abs(b), axis=-1, keepdims=True)
    rounding = (0.01 * jnp.finfo(b.dtype).eps) ** 2

    def dot(x, y):
        return jnp.sum(x * y, axis=-1, keepdims=True)

    def iterate(n, carry):
        z, r, p, rr = carry  # iterate, residual b - A z, direction, r . r
        ap = _times(p, k, pair, start, states) + ridge * p
        pap = dot(p, ap)
        moves = (rr > rounding) & (pap > 0)
        step = jnp.where(moves, rr / jnp.where(moves, pap, 1), 0)
        r = r - step * ap
        rr, rr_prev = dot(r, r), rr
        z = jnp.where((n < num_iter)[None, :, None, None, None], z + step * p, z)
        return z, r, r + jnp.where(moves, rr / jnp.where(moves, rr_prev, 1), 0) * p, rr

    r = b / jnp.where(size > 0, size, 1)
    z, *_ = jax.lax.fori_loop(0, jnp.max(num_iter), iterate, (jnp.zeros_like(b), r, r, dot(r, r)))
    return z * size * inverse[..., None]


_SOLVERS = {"chebyshev": _chebyshev, "cg": _cg}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(
    ridge: float,
    bp_lambda: bool,
    solver: str,
    q: jax.Array,
    k: jax.Array,
    pair: jax.Array,
    start: jax.Array,
    states: jax.Array,
    num_iter: jax.Array,
) -> jax.Array:
    """x_i ~ (H_i + ridge ||H_i||_F I)^-1 q_i, with the implicit gradient of the exact solution."""
    return _solve_forward(ridge, bp_lambda, solver, q, k, pair, start, states, num_iter)[0]


def _solve_forward(ridge, bp_lambda, solver, q, k, pair, start, states, num_iter):
    f = _norm(k, pair, start, states)
    f, x = kept((f, _SOLVERS[solver](q, k, pair, start, states, f, num_iter, ridge)))
    return x, (k, pair, start, states, num_iter, f, x)


def _solve_backward(ridge, bp_lambda, solver, saved, x_bar):
    """With y = (H + lambda I)^-1 x_bar (H is symmetric): dq = y; dL = -y^T (dH + dlambda I) x."""
    k, pair, start, states, num_iter, f, x = saved
    y = _SOLVERS[solver](x_bar, k, pair, start, states, f, num_iter, ridge)
    loss = partial(minus_quadratic, ridge, bp_lambda, y, x)
    return y, *jax.grad(loss, argnums=(0, 1, 2, 3))(k, pair, start, states), None


def minus_quadratic(
    ridge: float,
    bp_lambda: bool,
    y: jax.Array,
    x: jax.Array,
    k: jax.Array,
    pair: jax.Array,
    start: jax.Array,
    states: jax.Array,
) -> jax.Array:
    """-y^T (H + lambda I) x, summed: its gradient at constant y and x is that of the solve."""
    loss = -jnp.sum(y * _times(x, k, pair, start, states))
    if bp_lambda:
        loss -= ridge * jnp.sum(jnp.sum(y * x, axis=-1) * _norm(k, pair, start, states))
    return loss


_solve.defvjp(_solve_forward, _solve_backward)
