"""Selective state space recurrence (Mamba-2), token by token: the oracle, and the decode step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.ssd.inputs import Inputs, Token


def step(token: Token) -> tuple[jax.Array, jax.Array]:
    """One token of every row.

    Computes in the state's dtype; returns y [B, H, P] in x's dtype and the new state. The product
    with the state is written as a sum, which stays float32 where GPU matrix products would not.
    """
    x, B, C, dt, A, D, state = token
    acc = state.dtype
    group = C.shape[1] // B.shape[1]
    x_bhp = jnp.repeat(x.astype(acc), group, axis=1)
    b_bhn = jnp.repeat(B.astype(acc), group, axis=1)
    dt = dt.astype(acc)
    write = (dt[..., None] * x_bhp)[..., None] * b_bhn[..., None, :]
    state = jnp.exp(dt * A.astype(acc))[..., None, None] * state + write
    y = jnp.sum(state * C.astype(acc)[..., None, :], axis=-1)
    if D is not None:
        y = y + D.astype(acc)[:, None] * x_bhp
    return y.astype(x.dtype), state


def ssd(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """`step` over T tokens; see `pallas_kernels.ssd`."""
    x, B, C, dt, A, D, state, doc = inputs
    if doc is None:
        doc = jnp.zeros(x.shape[:2], jnp.int32)
    starts = jnp.diff(doc, axis=1, prepend=0) != 0

    def body(state, token):
        x, B, C, dt, start = token
        state = jnp.where(start[:, None, None, None], 0, state)
        y, state = step(Token(x, B, C, dt, A, D, state))
        return state, y

    tokens = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), (x, B, C, dt, starts))
    state, y = jax.lax.scan(body, state, tokens)
    return jnp.moveaxis(y, 0, 1), state
