"""Gated delta rule, token by token: the oracle, and the decode step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.gated_delta_rule.inputs import Inputs, Token


def step(token: Token, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """One token of every row.

    Computes in the state's dtype; returns o [B, H, V] in v's dtype and the new state. Products with
    the state are written as sums, which stay float32 where GPU matrix products would not.
    """
    q, k, v, g, beta, state = token
    acc = state.dtype
    group = q.shape[1] // k.shape[1]
    k_bhd = jnp.repeat(k.astype(acc), group, axis=1)
    v_bhv = jnp.repeat(v.astype(acc), group, axis=1)
    state = state * jnp.exp(g.astype(acc))[..., None, None]
    write = beta.astype(acc)[..., None] * (v_bhv - jnp.sum(state * k_bhd[..., None], axis=-2))
    state = state + k_bhd[..., None] * write[..., None, :]
    o = scale * jnp.sum(state * q.astype(acc)[..., None], axis=-2)
    return o.astype(v.dtype), state


def gated_delta_rule(inputs: Inputs, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """`step` over T tokens; see `pallas_kernels.gated_delta_rule`."""
    q, k, v, g, beta, state, doc = inputs
    if doc is None:
        doc = jnp.zeros(q.shape[:2], jnp.int32)
    starts = jnp.diff(doc, axis=1, prepend=0) != 0

    def body(state, token):
        q, k, v, g, beta, start = token
        state = jnp.where(start[:, None, None, None], 0, state)
        o, state = step(Token(q, k, v, g, beta, state), scale=scale)
        return state, o

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta, starts))
    state, o = jax.lax.scan(body, state, tokens)
    return jnp.moveaxis(o, 0, 1), state
