"""What layers remember between calls: one small pytree per layer kind, static shapes.

Recurrent states are float32 whatever the dtype of the model; convolution histories and keys and
values have the model's dtype. Nothing here counts tokens: `ModelState.length` does, once per row.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """Keys (after norm and RoPE) and values by token index: [B, capacity, K, D]."""

    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowState:
    """Ring of the last W keys and values, token i in slot i mod W: [B, W, K, D]."""

    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GKAState:
    """Gated KalmaNet: the last conv_size - 1 projections of q, k, v, and two float32 matrices.

    conv_q [B, K-1, Hq*D], conv_k, conv_v [B, K-1, Hkv*D] (None where there is no convolution);
    h_kk [B, H, D, D] key covariance, h_kv [B, H, D, D] (key dim, value dim).
    """

    conv_q: Array | None
    conv_k: Array | None
    conv_v: Array | None
    h_kk: Array
    h_kv: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GDNState:
    """Gated DeltaNet: convolution histories as in `GKAState`, s [B, H, D, D] (key, value)."""

    conv_q: Array | None
    conv_k: Array | None
    conv_v: Array | None
    s: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
    """Mamba2: convolution histories of x, B, C; s [B, H, P, N]; log_decay [B, H].

    log_decay is the sum of dt * A over all tokens seen (state composition needs it).
    """

    conv_x: Array
    conv_B: Array
    conv_C: Array
    s: Array
    log_decay: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BMojoState:
    """B'MOJO-F: rings of W entries, and the state of the inner mixer.

    k, v [B, 2W, K, D] = [in-context ring (W) | readable fading ring (W)]; k_pending, v_pending
    [B, W, K, D] hold the fading keys and values that become readable W tokens later. In each ring
    token i sits in slot i mod W.
    """

    k: Array
    v: Array
    k_pending: Array
    v_pending: Array
    inner: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """State of a whole model for a batch of rows.

    Attributes:
      layers: one state per layer.
      length: [B] int32, tokens that each row holds.
      position: [B] int32, rotary position of each row's next token; its length, unless it was
        composed (`hmf_jax.compose`).
      capacity: most tokens a row may hold (static); attention layers allocate this many entries.
      fresh: static; True until the first call, which may then use plain causal attention kernels.
    """

    layers: tuple[Any, ...]
    length: Array
    position: Array
    capacity: int = dataclasses.field(metadata={"static": True})
    fresh: bool = dataclasses.field(default=True, metadata={"static": True})

    def reset(self, rows: Array) -> Self:
        """Empty the rows where the [B] bool `rows` is True."""

        def clear(x: Array) -> Array:
            return jnp.where(rows.reshape(-1, *([1] * (x.ndim - 1))), jnp.zeros((), x.dtype), x)

        return jax.tree.map(clear, self)

    def gather(self, rows: Array) -> Self:
        """Rows [N] of this state, in this order, as a new state of batch N."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))
