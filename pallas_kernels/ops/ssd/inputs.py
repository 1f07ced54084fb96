"""The arrays of `ssd` and `ssd_step`."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax


class Inputs(NamedTuple):
    """What every implementation takes, with the letters of `sharded.spec`; zeros at padding.

    Attributes:
      x: [B, T, K, P].
      B: [B, T, K, N].
      C: [B, T, H, N].
      dt: [B, T, H].
      A: [H].
      D: [H], or None.
      state: [B, H, P, N]; its dtype is that of the computation.
      doc: [B, T] int32 document numbers (see `segments.documents`), or None for a single one.
    """

    x: Annotated[jax.Array, "btkp"]
    B: Annotated[jax.Array, "btkn"]
    C: Annotated[jax.Array, "bthn"]
    dt: Annotated[jax.Array, "bth"]
    A: Annotated[jax.Array, "h"]
    D: Annotated[jax.Array | None, "h"]
    state: Annotated[jax.Array, "bhpn"]
    doc: Annotated[jax.Array | None, "bt"]


class Token(NamedTuple):
    """The same for one token of every row, without a time axis."""

    x: Annotated[jax.Array, "bkp"]
    B: Annotated[jax.Array, "bkn"]
    C: Annotated[jax.Array, "bhn"]
    dt: Annotated[jax.Array, "bh"]
    A: Annotated[jax.Array, "h"]
    D: Annotated[jax.Array | None, "h"]
    state: Annotated[jax.Array, "bhpn"]
