"""Selective state space duality (Mamba-2 SSD), of a sequence and of one token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import sharded
from hmf_jax.pallas_kernels.dispatch import check_whole, resolve
from hmf_jax.pallas_kernels.ops.ssd import chunked, jla, reference
from hmf_jax.pallas_kernels.ops.ssd.inputs import Inputs, Token
from hmf_jax.pallas_kernels.recurrent import (
    check,
    check_heads,
    check_padding,
    mask_padding,
    start_state,
    why_not_jla,
)

__all__ = ["ssd", "ssd_step"]


def ssd(
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    D: jax.Array | None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    chunk_size: int = 64,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Selective state space model with a scalar decay per head, attention-shaped.

    Per head, with the state S [P, N]:

        S  <- exp(dt_t A) S + dt_t x_t B_t^T
        y_t = S C_t + D x_t

    x, B, C play the roles of values, keys, queries; there is no scale and no normalisation.
    Source: Dao, Gu, "Transformers are SSMs" (Mamba-2).

    Args:
      x: [B, T, K, P] inputs; K divides H, head h reads input head h // (H // K).
      B: [B, T, K, N] input projections.
      C: [B, T, H, N] output projections.
      dt: [B, T, H] step sizes >= 0, after the softplus, finite.
      A: [H] decay rates < 0.
      D: [H] skip factors, or None for no skip.
      initial_state: [B, H, P, N] state before the first token; None: zeros.
      segment_ids: [B, T] integers; 0 is padding (no write, no decay), a change between non-zero
        neighbours starts a document with a zero state. The first document continues
        `initial_state`; the final state is the last document's.
      lengths: [B] integers in 0..T, leading tokens of each row that are valid, the rest being
        padding. Cheaper than to look for it in `segment_ids`; with both, these have no 0 among
        the valid tokens, and only say where documents change.
      chunk_size: tokens per chunk of the "chunked" implementation; does not change the result.
      impl: "auto", "jla" (package jax-linear-attention, NVIDIA Hopper), "chunked" or "reference".
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`) or None.

    Returns:
      y: [B, T, H, P] in x's dtype; zero at padding.
      state: [B, H, P, N], float32 (float64 if x is float64).

    Raises:
      ValueError: shapes or dtypes do not fit, or `impl` cannot run here.
    """
    op = "ssd"
    if x.ndim != 4 or B.ndim != 4 or C.ndim != 4:
        raise ValueError(
            f"{op}: x, B, C have shapes {x.shape}, {B.shape}, {C.shape}; "
            "expected [B, T, K, P], [B, T, K, N], [B, T, H, N]."
        )
    batch, T, K, P = x.shape
    H, N = C.shape[2:]
    check_heads(op, H, K)
    check(op, "x", x, (batch, T, K, P), "B, T, K, P")
    check(op, "B", B, (batch, T, K, N), "B, T, K, N")
    check(op, "C", C, (batch, T, H, N), "B, T, H, N")
    check(op, "dt", dt, (batch, T, H), "B, T, H")
    check_whole(op, "T", T)
    check_whole(op, "chunk_size", chunk_size)
    check_padding(op, segment_ids, lengths, (batch, T))
    _check_rates(op, A, D, H)
    state = start_state(op, initial_state, (batch, H, P, N), "B, H, P, N", x.dtype)

    name = resolve(
        op,
        impl,
        {
            "jla": why_not_jla({jnp.dtype(t.dtype) for t in (x, B, C)}, (P, N)),
            "chunked": None,
            "reference": None,
        },
    )
    fn = {
        "jla": jla.ssd,
        "chunked": functools.partial(chunked.ssd, chunk_size=chunk_size),
        "reference": reference.ssd,
    }[name]

    doc, (x, B, C, dt) = mask_padding(segment_ids, lengths, x, B, C, dt)
    return sharded.run(
        fn,
        mesh,
        Inputs(x, B, C, dt, A, D, state, doc),
        ("bthp", "bhpn"),
        rename=sharded.rename_kv(H, K),
    )


def ssd_step(
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    D: jax.Array | None,
    state: jax.Array,
    *,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `ssd`, for decoding.

    Args:
      x: [B, K, P]; B: [B, K, N]; C: [B, H, N]; dt: [B, H]: one token of each.
      A: [H] decay rates < 0.
      D: [H] skip factors or None.
      state: [B, H, P, N], float32 (or float64). dt = 0 leaves a row's state unchanged.
      impl: "auto", "chunked" or "reference" (one and the same for a single token).
      mesh: device mesh or None.

    Returns:
      (y [B, H, P] in x's dtype, state [B, H, P, N]).

    Raises:
      ValueError: shapes or dtypes do not fit, or `impl` cannot run here.
    """
    op = "ssd_step"
    if x.ndim != 3 or C.ndim != 3:
        raise ValueError(
            f"{op}: x and C have shapes {x.shape}, {C.shape}; expected [B, K, P], [B, H, N]."
        )
    batch, K, P = x.shape
    H, N = C.shape[1:]
    check_heads(op, H, K)
    check(op, "x", x, (batch, K, P), "B, K, P")
    check(op, "B", B, (batch, K, N), "B, K, N")
    check(op, "C", C, (batch, H, N), "B, H, N")
    check(op, "dt", dt, (batch, H), "B, H")
    _check_rates(op, A, D, H)
    state = start_state(op, state, (batch, H, P, N), "B, H, P, N", x.dtype)
    resolve(op, impl, {"chunked": None, "reference": None})
    return sharded.run(
        reference.step,
        mesh,
        Token(x, B, C, dt, A, D, state),
        ("bhp", "bhpn"),
        rename=sharded.rename_kv(H, K),
    )


def _check_rates(op: str, A: jax.Array, D: jax.Array | None, heads: int) -> None:
    check(op, "A", A, (heads,), "H")
    if D is not None:
        check(op, "D", D, (heads,), "H")
