"""What implementations of one token of GKA share: checks, slots, the gradient of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import with_gradient_of
from hmf_jax.pallas_kernels.ops.gka.chunked import gka_chunked
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options, Result, Token
from hmf_jax.pallas_kernels.recurrent import check, check_heads


def check_step(token: Token, options: Options) -> None:
    """Raise ValueError unless these are arguments of a kernel for one token."""
    op = "gka_decode"
    if token.q.ndim != 3 or token.k.ndim != 3 or token.h_kk.ndim != 4:
        raise ValueError(
            f"{op}: q, k, h_kk have shapes {token.q.shape}, {token.k.shape}, {token.h_kk.shape}, "
            "expected [B, H, D], [B, K, D], [S, H, D, D]."
        )
    B, H, D = token.q.shape
    K, S = token.k.shape[1], token.h_kk.shape[0]
    check_heads(op, H, K)
    for name in ("k", "v"):
        check(op, name, getattr(token, name), (B, K, D), "B, K, D")
    for name in ("alpha", "g", "beta"):
        check(op, name, getattr(token, name), (B, H), "B, H")
    for name in ("h_kk", "h_kv"):
        check(op, name, getattr(token, name), (S, H, D, D), "S, H, D, D")
    for name, a in {"num_iter": token.num_iter, "slots": token.slots}.items():
        if a is not None and (a.shape != (B,) or a.dtype != jnp.int32):
            raise ValueError(f"{op}: {name} is {a.dtype}{a.shape}, expected int32 [B] = {(B,)}.")
    if token.slots is None and S != B:
        raise ValueError(f"{op}: {S} state rows for {B} rows; say which one each uses: slots.")
    if options.ridge < 0:
        raise ValueError(f"{op}: ridge={options.ridge}, expected a number >= 0.")


def at_slots(
    step: Callable[..., Result], slots: jax.Array, h_kk: jax.Array, h_kv: jax.Array
) -> Result:
    """`step(h_kk, h_kv)` on rows `slots` of the states by gather and scatter, as in `gka_step`.

    `step` takes and returns states of B rows, [B, H, D, D].
    """
    S = h_kk.shape[0]
    row = jnp.where((slots >= 0) & (slots < S), slots, S)  # S: reads zeros, is not written
    o, new = step(*(h.at[row].get(mode="fill", fill_value=0) for h in (h_kk, h_kv)))
    o = jnp.where((row < S)[:, None, None], o, 0)
    h_kk, h_kv = (h.at[row].set(n, mode="drop") for h, n in zip((h_kk, h_kv), new, strict=True))
    return o, (h_kk, h_kv)


def with_gradient(launch: Callable[[Token], Result], options: Options, token: Token) -> Result:
    """`launch(token)`, a kernel, with the gradient of the chunked implementation."""
    return with_gradient_of(partial(_chunked, options), launch, token)


def _chunked(options: Options, token: Token) -> Result:
    arrays = [a[:, None] for a in token[:6]]

    def step(h_kk, h_kv):
        inputs = Inputs(*arrays, num_iter=token.num_iter, doc=None, h_kk=h_kk, h_kv=h_kv)
        o, state = gka_chunked(inputs, options, solver="chebyshev", chunk_size=1)
        return o[:, 0], state

    states = token.h_kk, token.h_kv
    return step(*states) if token.slots is None else at_slots(step, token.slots, *states)
