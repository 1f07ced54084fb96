"""Gated delta rule (Gated DeltaNet), of a sequence and of one token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import sharded
from hmf_jax.pallas_kernels.dispatch import check_whole, finite, resolve
from hmf_jax.pallas_kernels.ops.gated_delta_rule import chunked, jla, reference
from hmf_jax.pallas_kernels.ops.gated_delta_rule.inputs import Inputs, Token
from hmf_jax.pallas_kernels.recurrent import (
    check,
    check_heads,
    check_padding,
    mask_padding,
    start_state,
    why_not_jla,
)

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    chunk_size: int = 64,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention with a decaying state that is corrected towards each new value.

    Per head, with the state S [D, V] (rows: keys, columns: values):

        S  <- exp(g_t) S
        S  <- S + beta_t k_t (v_t - S^T k_t)^T
        o_t = scale * S^T q_t

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule".

    Args:
      q: [B, T, H, D] queries, L2-normalised by the caller.
      k: [B, T, K, D] keys, L2-normalised by the caller; K divides H, query head h reads key head
        h // (H // K).
      v: [B, T, K, V] values.
      g: [B, T, H] log-decay, finite and <= 0.
      beta: [B, T, H] write strength in [0, 2].
      scale: factor on the output; None: D**-0.5.
      initial_state: [B, H, D, V] state before the first token; None: zeros.
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
      o: [B, T, H, V] in v's dtype; zero at padding.
      state: [B, H, D, V], float32 (float64 if v is float64).

    Raises:
      ValueError: shapes or dtypes do not fit, or `impl` cannot run here.
    """
    op = "gated_delta_rule"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"{op}: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; "
            "expected [B, T, H, D], [B, T, K, D], [B, T, K, V]."
        )
    B, T, H, D = q.shape
    K, V = v.shape[2:]
    check_heads(op, H, K)
    check(op, "q", q, (B, T, H, D), "B, T, H, D")
    check(op, "k", k, (B, T, K, D), "B, T, K, D")
    check(op, "v", v, (B, T, K, V), "B, T, K, V")
    check(op, "g", g, (B, T, H), "B, T, H")
    check(op, "beta", beta, (B, T, H), "B, T, H")
    check_whole(op, "T", T)
    check_whole(op, "chunk_size", chunk_size)
    check_padding(op, segment_ids, lengths, (B, T))
    state = start_state(op, initial_state, (B, H, D, V), "B, H, D, V", v.dtype)
    scale = finite(op, "scale", scale, D**-0.5)

    name = resolve(
        op,
        impl,
        {
            "jla": why_not_jla({jnp.dtype(x.dtype) for x in (q, k, v)}, (D, V)),
            "chunked": None,
            "reference": None,
        },
    )
    fn = {
        "jla": jla.gated_delta_rule,
        "chunked": functools.partial(chunked.gated_delta_rule, chunk_size=chunk_size),
        "reference": reference.gated_delta_rule,
    }[name]

    doc, (q, k, v, g, beta) = mask_padding(segment_ids, lengths, q, k, v, g, beta)
    return sharded.run(
        functools.partial(fn, scale=scale),
        mesh,
        Inputs(q, k, v, g, beta, state, doc),
        ("bthd", "bhdv"),
        rename=sharded.rename_kv(H, K),
    )


def gated_delta_rule_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    scale: float | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `gated_delta_rule`, for decoding.

    Args:
      q: [B, H, D]; k: [B, K, D]; v: [B, K, V]; g, beta: [B, H]: one token of each.
      state: [B, H, D, V], float32 (or float64). g = 0 and beta = 0 leave a row's state unchanged.
      scale: factor on the output; None: D**-0.5.
      impl: "auto", "chunked" or "reference" (one and the same for a single token).
      mesh: device mesh or None.

    Returns:
      (o [B, H, V] in v's dtype, state [B, H, D, V]).

    Raises:
      ValueError: shapes or dtypes do not fit, or `impl` cannot run here.
    """
    op = "gated_delta_rule_step"
    if q.ndim != 3 or v.ndim != 3:
        raise ValueError(
            f"{op}: q and v have shapes {q.shape}, {v.shape}; expected [B, H, D], [B, K, V]."
        )
    B, H, D = q.shape
    K, V = v.shape[1:]
    check_heads(op, H, K)
    check(op, "q", q, (B, H, D), "B, H, D")
    check(op, "k", k, (B, K, D), "B, K, D")
    check(op, "v", v, (B, K, V), "B, K, V")
    check(op, "g", g, (B, H), "B, H")
    check(op, "beta", beta, (B, H), "B, H")
    state = start_state(op, state, (B, H, D, V), "B, H, D, V", v.dtype)
    resolve(op, impl, {"chunked": None, "reference": None})
    return sharded.run(
        functools.partial(reference.step, scale=finite(op, "scale", scale, D**-0.5)),
        mesh,
        Token(q, k, v, g, beta, state),
        ("bhd", "bhdv"),
        rename=sharded.rename_kv(H, K),
    )
