"""Mamba-2 SSD in chunks, plain jnp: differentiable, any device, any length.

With G the running sum of dt * A inside a chunk of L tokens and S the state carried into it:

    y_i = exp(G_i) S C_i + sum_{j <= i} exp(G_i - G_j) (C_i.B_j) dt_j x_j + D x_i
    S  <- exp(G_L) S + sum_j exp(G_L - G_j) dt_j x_j B_j^T

(Dao and Gu, "Transformers are SSMs", section 6.) All chunks are computed at once; the only scan is
the elementwise recurrence of the states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.ssd.inputs import Inputs
from hmf_jax.pallas_kernels.recurrent import decays, from_chunks, scan_states, to_chunks


def ssd(inputs: Inputs, *, chunk_size: int) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ssd`."""
    x, B, C, dt, A, D, state, doc = inputs
    acc, dtype = state.dtype, x.dtype
    batch, T, K, P = x.shape
    H, N = C.shape[2:]
    chunk = min(chunk_size, T)
    dt = dt.astype(acc)
    pair, head = decays(to_chunks(dt * A.astype(acc), chunk, K), doc)  # nbkrij, nbkri
    C, dt = (to_chunks(t, chunk, K) for t in (C.astype(acc), dt))
    x, B = (to_chunks(t, chunk) for t in (x.astype(acc), B.astype(acc)))

    scores = jnp.einsum("nbkris,nbkjs->nbkrij", C, B) * pair * dt[..., None, :]
    y = jnp.einsum("nbkrij,nbkjp->nbkrip", scores, x)
    x_end = (pair[..., -1, :] * dt)[..., None] * x[:, :, :, None]
    write = jnp.einsum("nbkrjp,nbkjs->nbkrps", x_end, B)

    def body(state, chunk):
        decay, write = chunk
        return decay[..., None, None] * state + write, None

    state, carried, _ = scan_states(
        body, state.reshape(batch, K, H // K, P, N), (head[..., -1], write)
    )
    y = y + head[..., None] * jnp.einsum("nbkris,nbkrps->nbkrip", C, carried)
    if D is not None:
        y = y + D.astype(acc).reshape(K, H // K, 1, 1) * x[:, :, :, None]
    return from_chunks(y.astype(dtype), T), state.reshape(batch, H, P, N)
