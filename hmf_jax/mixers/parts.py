"""What is left of a context that was read in parts, for the kinds of layers to make one state of.

See `hmf_jax.composition`. Every part is a row of the batch, with the prefix in front of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Parts:
    """The rows of a composed context.

    Attributes:
      row, token: [capacity] int32, which token of which row each token of the new row is; the first
        `total` of them count. All that is kept of a row are its last tokens.
      counts: [N] int32, tokens that each row holds.
      total: [1] int32, tokens that the new row holds.
      ssm: "soup", "fuse" or "zero": what becomes of recurrent states.
    """

    row: Array
    token: Array
    counts: Array
    total: Array
    ssm: str

    def gather(self, x: Array) -> Array:
        """The tokens of the new row [1, capacity, K, D], from those of each row [N, S, K, D]."""
        kept = jnp.arange(len(self.row)) < self.total
        return jnp.where(kept[:, None, None], x[self.row, self.token], 0)[None]

    def newest(self, x: Array, size: int) -> Array:
        """Its last `size` tokens [1, size, K, D], from those of each row [N, size, K, D]."""
        at = self.total - size + jnp.arange(size)
        row, token = self.row[jnp.maximum(at, 0)], self.token[jnp.maximum(at, 0)]
        x = x[row, size - self.counts[row] + token]
        return jnp.where((at >= 0)[:, None, None], x, 0)[None]

    def sum(self, x: Array) -> Array:
        """[N, ...] -> [1, ...], added up in float32 at least."""
        return _over_rows(jnp.sum, x)

    def soup(self, state: Any) -> Any:
        """The mean of the rows' states [N, ...] as [1, ...]; zeros where `ssm` is "zero"."""
        if self.ssm == "zero":
            return jax.tree.map(lambda x: jnp.zeros_like(x[:1]), state)
        return jax.tree.map(partial(_over_rows, jnp.mean), state)


def _over_rows(do: Callable[..., Array], x: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return do(x.astype(wide), axis=0, keepdims=True).astype(x.dtype)
