"""The arrays of `rms_norm`, and its options."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """What every implementation takes.

    Attributes:
      x: [B, T, d] or [B, T, H, d].
      weight: [d].
      residual: shape and dtype of x, or None: what is added to x.
      gate: shape and dtype of x, or None; never with a residual.
    """

    x: jax.Array
    weight: jax.Array
    residual: jax.Array | None
    gate: jax.Array | None


class Options(NamedTuple):
    """`zero_centered`: weight + 1 in place of the weight. `cast_first`: cast to the dtype of x
    before the weight, not at the end; not with the others."""

    eps: float
    zero_centered: bool
    cast_first: bool
