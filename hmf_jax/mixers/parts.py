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
Span = tuple[int, int, int]  # row, first token, end


@dataclasses.dataclass(frozen=True)
class Parts:
    """The rows of a composed context.

    Attributes:
      spans: the tokens whose keys and values are kept, one stretch of a row after the other.
      counts: [N] int32, tokens that each row holds.
      total: [1] int32, tokens of all spans together: what the new row holds.
      capacity: tokens that the new row has room for.
      ssm: "soup", "fuse" or "zero": what becomes of recurrent states.
    """

    spans: tuple[Span, ...]
    counts: Array
    total: Array
    capacity: int
    ssm: str

    def gather(self, x: Array) -> Array:
        """The tokens of all spans [1, capacity, K, D], from those of each row [N, S, K, D]."""
        x = jnp.concatenate([x[row, start:end] for row, start, end in self.spans])
        return jnp.pad(x, ((0, self.capacity - x.shape[0]), (0, 0), (0, 0)))[None]

    def newest(self, x: Array, size: int) -> Array:
        """The last `size` tokens of all spans [1, size, K, D], from those of each row [N, ...]."""
        tails = [x[row, size - min(size, end - start) :] for row, start, end in self.spans]
        return jnp.pad(jnp.concatenate(tails), ((size, 0), (0, 0), (0, 0)))[None, -size:]

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
