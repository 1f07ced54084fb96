"""Gated KalmaNet for NVIDIA GPUs before Hopper: Triton kernels, called through jax-triton.

`states` is sequential over chunks, `solve` (norms, then Chebyshev iterations) parallel over them
(triton_solver.py). This file makes a differentiable operator of them; blend, readout and what
gradients need beyond a second `solve` are those of chunked.py. A single token is another kernel
(triton_decode.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.compat import compute_capability
from hmf_jax.pallas_kernels.dispatch import kept
from hmf_jax.pallas_kernels.ops.gka import chunked
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options, Result, Token
from hmf_jax.pallas_kernels.ops.gka.triton_solver import CHUNK, solve, states
from hmf_jax.pallas_kernels.recurrent import from_chunks, to_chunks
from hmf_jax.pallas_kernels.triton import why_no_triton

HEAD_DIMS = (32, 64, 128)
SMALL = ("8.6", "8.9", "12.0", "12.1")  # compute capabilities with 99 KiB of memory per block


def why_not(inputs: Inputs | Token, solver: str) -> str | None:
    """Why the kernels cannot run these arguments on this machine; None if they can."""
    if solver != "chebyshev":
        return f"its kernels have the Chebyshev solver, not {solver!r}"
    if reason := why_no_triton():
        return reason
    dtypes = {jnp.dtype(x.dtype) for x in (inputs.q, inputs.k, inputs.v)}
    head_dim, h_kk, h_kv = inputs.q.shape[-1], inputs.h_kk, inputs.h_kv
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"its kernels take bfloat16 or float32, got {', '.join(sorted(map(str, dtypes)))}"
    if any(jnp.dtype(x.dtype) != jnp.float32 for x in (h_kk, h_kv)):
        return f"its kernels keep float32 states, got {h_kk.dtype} and {h_kv.dtype}"
    if head_dim not in HEAD_DIMS:
        return f"its kernels take head dims {HEAD_DIMS}, got {head_dim}"
    if head_dim == 128 and jnp.dtype(jnp.float32) in dtypes and compute_capability() in SMALL:
        return "its float32 kernel for head dim 128 needs 128 KiB of shared memory"
    return None


def gka_triton(inputs: Inputs, options: Options) -> Result:
    """See `pallas_kernels.gka`.

    Dtypes and head dims as in `why_not`. Gradients are implicit, as in chunked.py.
    """
    T, dtype, doc = inputs.q.shape[1], inputs.q.dtype, inputs.doc
    q, k, v, alpha, g, beta = (x.astype(jnp.float32) for x in inputs[:6])
    g_kk = g if options.decay_kk else jnp.zeros_like(g)
    num_iter = jnp.asarray(inputs.num_iter)
    static = _Static(options.ridge, options.bp_lambda, dtype)
    x, h_kk = _solution(static, q, k, g_kk, beta, num_iter, doc, inputs.h_kk)
    starts, h_kv = _read_states(static, k, v, g, beta, doc, inputs.h_kv)
    q, x, alpha = (to_chunks(a, CHUNK) for a in (q, x, alpha))
    o = chunked.readout(q, x, alpha, num_iter, *_chunks(k, v, g, beta, doc), starts)
    return (options.scale * from_chunks(o[:, :, :, None], T)).astype(dtype), (h_kk, h_kv)


class _Static(NamedTuple):
    """`dtype` is what kernels multiply in; float32 arrays around them keep sums of gradients."""

    ridge: float
    bp_lambda: bool
    dtype: Any


def _sums(g: jax.Array, doc: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`cum` and `start` of `states`, from g [B, T, H]."""
    T = g.shape[1]
    g = to_chunks(g, CHUNK)
    # exp(-100) is 0 in float32; a larger sum would cost the digits of all differences.
    cum = jnp.cumsum(jnp.maximum(g, -100), axis=-1)
    start = chunked.chunk_decays(g, doc)[1]
    cum, start = (from_chunks(x[:, :, :, None, :, None], T)[..., 0] for x in (cum, start))
    return cum, start


def _chunks(
    k: jax.Array, u: jax.Array, g: jax.Array, beta: jax.Array, doc: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What chunked.py computes with: scaled k and u of all heads, pair and start, in chunks."""
    k, u = (to_chunks(chunked.scaled(x, beta), CHUNK) for x in (k, u))
    return k, u, *chunked.chunk_decays(to_chunks(g, CHUNK), doc)


def _run_states(static: _Static, k, u, g, beta, doc, initial, dtype):
    k, u = k.astype(static.dtype), u.astype(static.dtype)
    return states(k, u, *_sums(g, doc), beta, doc, initial, dtype=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_states(static, k, u, g, beta, doc, initial):
    """`chunked.chunk_states` of unscaled float32 k and u by the kernel."""
    starts, last = _run_states(static, k, u, g, beta, doc, initial, jnp.float32)
    return jnp.moveaxis(starts, 2, 0), last


def _read_states_forward(static, k, u, g, beta, doc, initial):
    saved = (k.astype(static.dtype), u.astype(static.dtype), g, beta, doc, initial)
    starts, last = _read_states(static, k, u, g, beta, doc, initial)
    return (kept(starts), last), saved


def _read_states_backward(static, saved, cotangents):
    k, u, g, beta, doc, initial = saved

    def plain(k, u, g, beta, initial):
        return chunked.chunk_states(*_chunks(k, u, g, beta, doc), initial)

    wide = (k.astype(jnp.float32), u.astype(jnp.float32), g, beta, initial)
    *d_token, d_initial = jax.vjp(plain, *wide)[1](cotangents)
    return *d_token, None, d_initial


_read_states.defvjp(_read_states_forward, _read_states_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solution(static, q, k, g, beta, num_iter, doc, h_kk):
    """x and the last H, from unscaled float32 k; with the implicit gradient of the exact x."""
    return _solution_forward(static, q, k, g, beta, num_iter, doc, h_kk)[0]


def _solution_forward(static, q, k, g, beta, num_iter, doc, h_kk):
    q, low = q.astype(static.dtype), k.astype(static.dtype)
    starts, last = _run_states(static, k, k, g, beta, doc, h_kk, static.dtype)
    decays = (*_sums(g, doc), beta, doc)
    x, f = solve(q, low, *decays, starts, num_iter, None, ridge=static.ridge)
    starts, f, x = kept((starts, f, x))
    saved = (low, g, beta, num_iter, doc, h_kk, starts, f, x)
    return (x.astype(jnp.float32), last), saved


def _solution_backward(static, saved, cotangents):
    """As `chunked._solve_backward`; the scan that makes the states is differentiated in jnp."""
    low, g, beta, num_iter, doc, h_kk, starts, f, x = saved
    x_bar, last_bar = cotangents
    decays = (*_sums(g, doc), beta, doc)
    y, _ = solve(x_bar.astype(low.dtype), low, *decays, starts, num_iter, f, ridge=static.ridge)
    y_chunks, x_chunks = (to_chunks(a.astype(jnp.float32), CHUNK) for a in (y, x))

    def loss(k, g, beta, h_kk):
        k, _, pair, start = _chunks(k, k, g, beta, doc)
        starts, last = chunked.chunk_states(k, k, pair, start, h_kk)
        quadratic = chunked.minus_quadratic(
            static.ridge, static.bp_lambda, y_chunks, x_chunks, k, pair, start, starts
        )
        return quadratic + jnp.sum(last * last_bar)

    d_k, d_g, d_beta, d_h = jax.grad(loss, argnums=(0, 1, 2, 3))(
        low.astype(jnp.float32), g, beta, h_kk
    )
    return y.astype(jnp.float32), d_k, d_g, d_beta, None, None, d_h


_solution.defvjp(_solution_forward, _solution_backward)
