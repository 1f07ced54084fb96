"""The arrays of `attention` and `decode_attention`."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax


class Inputs(NamedTuple):
    """What every implementation takes, with the letters of `sharded.spec`.

    Attributes:
      q: [B, T, H, D].
      k, v: [B, S, K, D]; K divides H, query head e reads head e // (H // K).
      offset: [B] integers, token index of each row's first query; None: keys are the T own tokens.
      segment_ids: [B, T] integers, 0 = padding, a change starts a new document; or None.
      lengths: [B] integers, leading tokens that are valid, or None.
    """

    q: Annotated[jax.Array, "bthd"]
    k: Annotated[jax.Array, "bskd"]
    v: Annotated[jax.Array, "bskd"]
    offset: Annotated[jax.Array | None, "b"] = None
    segment_ids: Annotated[jax.Array | None, "bt"] = None
    lengths: Annotated[jax.Array | None, "b"] = None


class Token(NamedTuple):
    """One query of every row, and a buffer.

    Attributes:
      q: [B, H, D].
      k, v: [B, S, K, D].
      lengths: [B] integers, leading entries of the buffer that are in use.
    """

    q: Annotated[jax.Array, "bhd"]
    k: Annotated[jax.Array, "bskd"]
    v: Annotated[jax.Array, "bskd"]
    lengths: Annotated[jax.Array, "b"]
