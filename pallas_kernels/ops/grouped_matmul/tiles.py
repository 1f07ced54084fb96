"""Which tiles of rows a grouped product is made of."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGN = 8  # tiles begin at multiples of it, as the copy engine wants


class Tiles(NamedTuple):
    """Tiles of consecutive rows, of which those of one group count; int32 [tiles], in order.

    Attributes:
      group: the group; the number of groups for the rows behind the last one.
      begin: the first row of the tile.
      skip: how many of its first rows are of an earlier group.
      rows: how many of the next ones are of this group; 0 for tiles that nobody needs, at the end.
    """

    group: jax.Array
    begin: jax.Array
    skip: jax.Array
    rows: jax.Array


def tiles_of(sizes: jax.Array, rows: int, height: int) -> Tiles:
    """The tiles of `height` rows for groups of these sizes, int32 [G], that lie one after the other
    in `rows` rows; as many tiles as any sizes may need."""
    sizes = jnp.append(sizes, rows - jnp.sum(sizes))
    start = _before(sizes)
    begin = start // ALIGN * ALIGN
    counts = jnp.where(sizes > 0, (start + sizes - begin + height - 1) // height, 0)
    first = _before(counts)
    tile = jnp.arange(most_tiles(rows, len(sizes) - 1, height), dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= first + counts, axis=1, dtype=jnp.int32)
    needed = group < len(sizes)
    group = jnp.minimum(group, len(sizes) - 1)
    here = begin[group] + height * (tile - first[group])
    skip = jnp.maximum(start[group] - here, 0)
    last = jnp.minimum(start[group] + sizes[group] - here, height)
    rest = tuple(jnp.where(needed, x, 0) for x in (here, skip, last - skip))
    return Tiles(group, *rest)


def most_tiles(rows: int, groups: int, height: int) -> int:
    """The most tiles of so many rows, in `groups` groups and one for the rows behind them."""
    filled = min(groups + 1, rows)
    return (rows + (ALIGN - 1) * filled) // height + filled


def _before(x: jax.Array) -> jax.Array:
    """Sums of the entries in front of each one. (On GPUs, `jnp.cumsum` of a few numbers takes
    longer, and XLA computes it again wherever it is used.)"""
    i = jnp.arange(len(x))
    return jnp.sum(jnp.where(i < i[:, None], x, 0), axis=1, dtype=jnp.int32)
