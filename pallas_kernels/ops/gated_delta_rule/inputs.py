"""The arrays of `gated_delta_rule` and `gated_delta_rule_step`."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax


class Inputs(NamedTuple):
    """What every implementation takes, with the letters of `sharded.spec`; zeros at padding.

    Attributes:
      q: [B, T, H, D].
      k: [B, T, K, D].
      v: [B, T, K, V].
      g, beta: [B, T, H].
      state: [B, H, D, V]; its dtype is that of the computation.
      doc: [B, T] int32 document numbers (see `segments.documents`), or None for a single one.
    """

    q: Annotated[jax.Array, "bthd"]
    k: Annotated[jax.Array, "btkd"]
    v: Annotated[jax.Array, "btkv"]
    g: Annotated[jax.Array, "bth"]
    beta: Annotated[jax.Array, "bth"]
    state: Annotated[jax.Array, "bhdv"]
    doc: Annotated[jax.Array | None, "bt"]


class Token(NamedTuple):
    """The same for one token of every row, without a time axis."""

    q: Annotated[jax.Array, "bhd"]
    k: Annotated[jax.Array, "bkd"]
    v: Annotated[jax.Array, "bkv"]
    g: Annotated[jax.Array, "bh"]
    beta: Annotated[jax.Array, "bh"]
    state: Annotated[jax.Array, "bhdv"]
