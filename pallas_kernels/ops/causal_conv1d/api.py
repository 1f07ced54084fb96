"""Depthwise causal convolution over a few tokens, with the history it must remember."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import sharded
from hmf_jax.pallas_kernels.dispatch import resolve
from hmf_jax.pallas_kernels.ops.causal_conv1d.chunked import causal_conv1d_chunked
from hmf_jax.pallas_kernels.ops.causal_conv1d.inputs import Inputs
from hmf_jax.pallas_kernels.ops.causal_conv1d.reference import causal_conv1d_reference
from hmf_jax.pallas_kernels.recurrent import check, check_padding

__all__ = ["causal_conv1d"]

_IMPLS = {"chunked": causal_conv1d_chunked, "reference": causal_conv1d_reference}


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
    channels: Literal["h", "k"] = "h",
) -> tuple[jax.Array, jax.Array]:
    """y[t, c] = act( sum_i weight[i, c] * x[t - K + 1 + i, c] + bias[c] ).

    `weight[K-1]` multiplies the current token; tokens before the start of a document are zero. The
    sum and the activation are float32 (float64 for float64 inputs), with one cast at the end.

    Args:
      x: [B, T, C], any float dtype, T >= 1.
      weight: [K, C] taps, oldest first.
      bias: [C], or None.
      activation: "silu" or None.
      initial_state: [B, K-1, C], the newest K-1 inputs before x, newest last; None = zeros.
      segment_ids: [B, T] integers; 0 = padding, a change between non-zero neighbours starts a new
        document. The first document continues `initial_state`. Padding may be anywhere.
      lengths: [B] integers in 0..T, leading tokens of each row that are valid, the rest being
        padding. Cheaper than to look for it in `segment_ids`; with both, these have no 0 among
        the valid tokens, and only say where documents change.
      impl: "auto", "chunked" or "reference".
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`), or None.
      channels: how a mesh splits C: like query heads ("h") or like key/value heads ("k").

    Returns:
      y: [B, T, C], dtype of x; zero at padding.
      state: [B, K-1, C], dtype of x: the newest K-1 inputs of the last document, newest last,
        zeros where it is shorter. A row of padding only keeps its state.

    Raises:
      ValueError: an argument has the wrong shape or value.
    """
    op = "causal_conv1d"
    if x.ndim != 3 or weight.ndim != 2 or x.shape[1] < 1 or weight.shape[0] < 1:
        raise ValueError(
            f"{op}: x, weight have shapes {x.shape}, {weight.shape}, expected [B, T, C] and [K, C] "
            "with T, K >= 1."
        )
    (B, T, C), K = x.shape, weight.shape[0]
    state = jnp.zeros((B, K - 1, C), x.dtype) if initial_state is None else initial_state
    check(op, "x", x, (B, T, C), "B, T, C")
    check(op, "weight", weight, (K, C), "K, C")
    check(op, "initial_state", state, (B, K - 1, C), "B, K-1, C")
    if bias is not None:
        check(op, "bias", bias, (C,), "C")
    check_padding(op, segment_ids, lengths, (B, T))
    if activation not in ("silu", None):
        raise ValueError(f"{op}: activation={activation!r} is unknown; use 'silu' or None.")
    if channels not in ("h", "k"):
        raise ValueError(f"{op}: channels={channels!r} is unknown; use 'h' or 'k'.")
    name = resolve(op, impl, dict.fromkeys(_IMPLS))
    return sharded.run(
        partial(_IMPLS[name], activation=activation),
        mesh,
        Inputs(x, weight, bias, state.astype(x.dtype), segment_ids, lengths),
        ("btc", "bic"),
        rename={"c": channels},
    )
