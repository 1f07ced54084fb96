"""The arrays of `gka` and `gka_step`."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import numpy as np


class Inputs(NamedTuple):
    """What every implementation takes, with the letters of `sharded.spec`; zeros at padding.

    Attributes:
      q: [B, T, H, D].
      k, v: [B, T, K, D], not scaled by beta; K divides H, query head e uses head e // (H / K).
      alpha, g, beta: [B, T, H].
      num_iter: [B] int32; a numpy array where its value is known.
      doc: [B, T] int32 document numbers (see `segments.documents`), or None for a single one.
      h_kk, h_kv: [B, H, D, D], h_kk symmetric; their dtype is that of the computation.
    """

    q: Annotated[jax.Array, "bthd"]
    k: Annotated[jax.Array, "btkd"]
    v: Annotated[jax.Array, "btkd"]
    alpha: Annotated[jax.Array, "bth"]
    g: Annotated[jax.Array, "bth"]
    beta: Annotated[jax.Array, "bth"]
    num_iter: Annotated[jax.Array | np.ndarray, "b"]
    doc: Annotated[jax.Array | None, "bt"]
    h_kk: Annotated[jax.Array, "bhde"]
    h_kv: Annotated[jax.Array, "bhde"]


class Token(NamedTuple):
    """The same for one token of every row, without a time axis.

    Attributes:
      num_iter: [B] int32; 0 leaves the query as it is and still updates h_kk.
      slots: [B] int32, the state row of every row, no two equal; outside [0, S) the row is
        inactive: it reads and writes nothing and its output is 0. None: row b uses state row b.
      h_kk, h_kv: [S, H, D, D] float32. Rows that no slot names keep their content.
    """

    q: Annotated[jax.Array, "bhd"]
    k: Annotated[jax.Array, "bkd"]
    v: Annotated[jax.Array, "bkd"]
    alpha: Annotated[jax.Array, "bh"]
    g: Annotated[jax.Array, "bh"]
    beta: Annotated[jax.Array, "bh"]
    num_iter: Annotated[jax.Array, "b"]
    slots: Annotated[jax.Array | None, "b"]
    h_kk: Annotated[jax.Array, "bhde"]
    h_kv: Annotated[jax.Array, "bhde"]


class Options(NamedTuple):
    """What is compiled in, of a sequence and of a token.

    Attributes:
      ridge: lambda over the Frobenius norm of H, >= 0.
      scale: factor on the output.
      decay_kk: whether H decays.
      bp_lambda: whether gradients flow through lambda.
    """

    ridge: float
    scale: float
    decay_kk: bool
    bp_lambda: bool = True


Result = tuple[jax.Array, tuple[jax.Array, jax.Array]]  # o, dtype of v, and (h_kk, h_kv)
