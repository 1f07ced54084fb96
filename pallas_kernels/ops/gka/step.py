"""What implementations of one token of GKA share: checks, slots, the gradient of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import with_gradient_of
from hmf_jax.pallas_kernels.ops.gka.chunked import gka_chunked
from hmf_jax.pallas_kernels.recurrent import check, check_heads

Result = tuple[jax.Array, tuple[jax.Array, jax.Array]]  # o [B, H, D] and (h_kk, h_kv)


def check_step(q, k, v, alpha, g, beta, num_iter, slots, h_kk, h_kv, ridge: float) -> None:
    """Raise ValueError unless these are arguments of a kernel for one token."""
    op = "gka_decode"
    if q.ndim != 3 or k.ndim != 3 or h_kk.ndim != 4:
        raise ValueError(
            f"{op}: q, k, h_kk have shapes {q.shape}, {k.shape}, {h_kk.shape}, "
            "expected [B, H, D], [B, K, D], [S, H, D, D]."
        )
    B, H, D = q.shape
    K, S = k.shape[1], h_kk.shape[0]
    check_heads(op, H, K)
    for name, x in {"k": k, "v": v}.items():
        check(op, name, x, (B, K, D), "B, K, D")
    for name, x in {"alpha": alpha, "g": g, "beta": beta}.items():
        check(op, name, x, (B, H), "B, H")
    for name, x in {"h_kk": h_kk, "h_kv": h_kv}.items():
        check(op, name, x, (S, H, D, D), "S, H, D, D")
    for name, x in {"num_iter": num_iter, "slots": slots}.items():
        if x is not None and (x.shape != (B,) or x.dtype != jnp.int32):
            raise ValueError(f"{op}: {name} is {x.dtype}{x.shape}, expected int32 [B] = {(B,)}.")
    if slots is None and S != B:
        raise ValueError(f"{op}: {S} state rows for {B} rows; say which one each uses: slots.")
    if ridge < 0:
        raise ValueError(f"{op}: ridge={ridge}, expected a number >= 0.")


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


def with_gradient(
    launch: Callable[..., Result], options: tuple[float, float, bool], *arrays: jax.Array | None
) -> Result:
    """`launch(*arrays)`, a kernel, with the gradient of the chunked implementation.

    Args:
      launch: the step.
      options: its ridge, scale and decay_kk.
      arrays: q, k, v, alpha, g, beta, num_iter, slots (or None), h_kk, h_kv as in `gka_step`.
    """
    return with_gradient_of(partial(_chunked, *options), launch, *arrays)


def _chunked(ridge, scale, decay_kk, *arrays) -> Result:
    *token, num_iter, slots, h_kk, h_kv = arrays

    def step(h_kk, h_kv):
        o, state = gka_chunked(
            *[x[:, None] for x in token],
            num_iter=num_iter,
            segment_ids=None,
            h_kk=h_kk,
            h_kv=h_kv,
            ridge=ridge,
            scale=scale,
            decay_kk=decay_kk,
            bp_lambda=True,
            solver="chebyshev",
            chunk_size=1,
        )
        return o[:, 0], state

    return step(h_kk, h_kv) if slots is None else at_slots(step, slots, h_kk, h_kv)
