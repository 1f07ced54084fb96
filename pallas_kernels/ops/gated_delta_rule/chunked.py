"""Gated delta rule in chunks (WY form), plain jnp: differentiable, any device, any length.

With G the running sum of g inside a chunk of C tokens and S the state carried into it, the errors
e_i = v_i - (prediction for k_i) weighted by beta obey a unit lower triangular system:

    (I + A) d = beta * (v - exp(G) * k S),   A_ij = beta_i exp(G_i - G_j) k_i.k_j  for j < i
    o_i = scale * (exp(G_i) q_i S + sum_{j <= i} exp(G_i - G_j) (q_i.k_j) d_j)
    S  <- exp(G_C) S + sum_j exp(G_C - G_j) k_j d_j^T

(Yang et al., "Gated Delta Networks", section 3.3.) Everything that does not depend on S is computed
for all chunks at once; a scan carries S.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.gated_delta_rule.inputs import Inputs
from hmf_jax.pallas_kernels.recurrent import decays, from_chunks, scan_states, to_chunks


def gated_delta_rule(
    inputs: Inputs, *, scale: float, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.gated_delta_rule`."""
    q, k, v, g, beta, state, doc = inputs
    acc = state.dtype
    B, T, H, D = q.shape
    K, V = v.shape[2:]
    chunk = min(chunk_size, T)
    q, g, beta = (to_chunks(x, chunk, K) for x in (q, g.astype(acc), beta.astype(acc)))
    k, v = to_chunks(k, chunk), to_chunks(v, chunk)

    pair, head = decays(g, doc)  # nbkrij, nbkri
    k_acc = k.astype(acc)
    kk = jnp.einsum("nbkid,nbkjd->nbkij", k_acc, k_acc, preferred_element_type=acc)
    a = jnp.tril(beta[..., None] * pair * kk[:, :, :, None], -1)
    eye = jnp.eye(chunk, dtype=acc)
    inverse = jax.scipy.linalg.solve_triangular(
        eye + a, jnp.broadcast_to(eye, a.shape), lower=True, unit_diagonal=True
    )
    inverse = inverse * beta[..., None, :]
    q_acc = q.astype(acc) * scale
    qk = pair * jnp.einsum("nbkrid,nbkjd->nbkrij", q_acc, k_acc, preferred_element_type=acc)

    def body(state, chunk):  # state bkrdv
        q, k, v, inverse, qk, head, tail = chunk
        q, k, v = q.astype(acc) * scale, k.astype(acc), v.astype(acc)
        head = head[..., None]
        error = v[:, :, None] - head * jnp.einsum("bkid,bkrdv->bkriv", k, state)
        write = jnp.einsum("bkrij,bkrjv->bkriv", inverse, error)
        o = head * jnp.einsum("bkrid,bkrdv->bkriv", q, state)
        o = o + jnp.einsum("bkrij,bkrjv->bkriv", qk, write)
        state = head[..., -1:, :] * state
        state = state + jnp.einsum("bkid,bkriv->bkrdv", k, tail[..., None] * write)
        return state, o

    state, _, o = scan_states(
        body, state.reshape(B, K, H // K, D, V), (q, k, v, inverse, qk, head, pair[..., -1, :])
    )
    return from_chunks(o.astype(v.dtype), T), state.reshape(B, H, D, V)
