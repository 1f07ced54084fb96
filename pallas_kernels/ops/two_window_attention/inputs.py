"""The arrays of `two_window_attention` and `two_window_decode`."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax


class Inputs(NamedTuple):
    """What every implementation takes, with the letters of `sharded.spec`.

    Attributes:
      q: [B, T, H, D] queries of the in-context window.
      k, v: [B, P + T, K, D] in-context keys and values; K divides H.
      k_fading, v_fading: [B, P' + T, K, D] fading ones.
      q_fading: [B, T, H, D], or None if it is q.
      offset: [B] integers, token index of each row's first query; None means P == P' == 0.
      segment_ids: [B, T] integers, 0 = padding, a change starts a new document; or None.
      lengths: [B] integers, leading tokens that are valid, or None.
    """

    q: Annotated[jax.Array, "bthd"]
    k: Annotated[jax.Array, "bskd"]
    v: Annotated[jax.Array, "bskd"]
    k_fading: Annotated[jax.Array, "bskd"]
    v_fading: Annotated[jax.Array, "bskd"]
    q_fading: Annotated[jax.Array | None, "bthd"] = None
    offset: Annotated[jax.Array | None, "b"] = None
    segment_ids: Annotated[jax.Array | None, "bt"] = None
    lengths: Annotated[jax.Array | None, "b"] = None


class Token(NamedTuple):
    """One token of every row, and a buffer of two rings.

    Attributes:
      q: [B, H, D].
      k, v: [B, 2W, K, D].
      lengths_in, lengths_fading: [B] integers, entries in use in each half.
      q_fading: [B, H, D], or None if it is q.
    """

    q: Annotated[jax.Array, "bhd"]
    k: Annotated[jax.Array, "bskd"]
    v: Annotated[jax.Array, "bskd"]
    lengths_in: Annotated[jax.Array, "b"]
    lengths_fading: Annotated[jax.Array, "b"]
    q_fading: Annotated[jax.Array | None, "bhd"] = None
