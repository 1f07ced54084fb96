"""The arrays of `causal_conv1d`."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax


class Inputs(NamedTuple):
    """What every implementation takes, with the letters of `sharded.spec` ("c": channels).

    Attributes:
      x: [B, T, C].
      weight: [K, C] taps, oldest first.
      bias: [C], or None.
      state: [B, K-1, C], dtype of x: the newest inputs before x, newest last.
      segment_ids: [B, T] integers, 0 = padding, or None.
      lengths: [B] integers, leading tokens that are valid, or None. With both, `segment_ids` have
        no 0 among these.
    """

    x: Annotated[jax.Array, "btc"]
    weight: Annotated[jax.Array, "ic"]
    bias: Annotated[jax.Array | None, "c"]
    state: Annotated[jax.Array, "bic"]
    segment_ids: Annotated[jax.Array | None, "bt"]
    lengths: Annotated[jax.Array | None, "b"]
