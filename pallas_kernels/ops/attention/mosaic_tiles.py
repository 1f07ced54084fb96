"""Which tiles of keys a tile of queries visits, and how they are masked: see mosaic.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.mosaic import MATRIX, ROWS, along_rows

M = 64  # rows of a warpgroup
TILE = 2 * M  # rows of a CTA; lengths are padded to it
MEMORY = 2  # the warpgroup that loads; 0 and 1 compute
LOG2E = math.log2(math.e)
LOWEST = -1e30  # start of running maxima: finite, so that exp2(-inf - LOWEST) is 0
FAR = 2**30
bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
Ref = Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What a trace depends on.

    Attributes:
      windows: (newest, oldest) of each key_set: query i sees the entries own + i - d with
        newest <= d <= oldest.
      length: T without padding.
      scale: factor of the scores.
    """

    windows: tuple[tuple[int, int], ...]
    length: int
    scale: float
    interpret: bool

    def only(self, key_set: int) -> Options:
        return dataclasses.replace(self, windows=self.windows[key_set : key_set + 1])


def spans_of(
    options: Options,
    q: jax.Array,
    ks: tuple[jax.Array, ...],
    places: jax.Array,
    doc: jax.Array | None,
    queries: int,
    keys: int,
    *,
    by_key: bool = False,
) -> jax.Array:
    """Tiles of keys to visit for each tile of queries (or the reverse, `by_key`).

    Args:
      places, doc: see `forward`.
      queries, keys: tokens per tile.

    Returns:
      int32 [key_sets, B, tiles, 4]: begin, end, full_begin, full_end. Those in begin <= tile < end
      are to be visited, those in full_begin <= tile < full_end are visible as a whole.
    """

    def span(window: tuple[int, int], k: jax.Array, place: jax.Array) -> jax.Array:
        newest, oldest = window
        own, first = place[:, 0, None, None], place[:, 1, None, None]
        query = jnp.arange(0, q.shape[1], queries)[:, None]
        key = jnp.arange(0, k.shape[1], keys)
        nearest = own + query - (key + keys - 1)
        farthest = own + query + queries - 1 - key
        some = (farthest >= newest) & (nearest <= oldest) & (query < options.length)
        some &= (key + keys > first) & (key < own + options.length)
        every = (nearest >= newest) & (farthest <= oldest) & (key >= first)
        if doc is not None:
            (q_low, q_high, q_first), (k_low, k_high, k_first) = (
                bounds(doc, queries),
                bounds(doc, keys),
            )
            some &= (q_first[:, :, None] <= k_high[:, None]) & (
                k_first[:, None] <= q_high[:, :, None]
            )
            every &= (q_low[:, :, None] == k_high[:, None]) & (q_high[:, :, None] == k_low[:, None])
        if by_key:
            some, every = jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2)
        every &= some
        number = jnp.arange(some.shape[-1])
        end = jnp.max(jnp.where(some, number + 1, 0), -1)
        begin = jnp.minimum(jnp.min(jnp.where(some, number, FAR), -1), end)
        full_end = jnp.max(jnp.where(every, number + 1, 0), -1)
        gap = ~every & (number < full_end[..., None])
        full_begin = jnp.max(jnp.where(gap, number + 1, 0), -1)
        return jnp.stack([begin, end, full_begin, full_end], -1).astype(i32)

    def bounds(doc: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Lowest and highest document of every tile, lowest but for padding."""
        x = doc.reshape(doc.shape[0], -1, size)
        return x.min(-1), x.max(-1), jnp.where(x == 0, FAR, x).min(-1)

    return jnp.stack([span(*x) for x in zip(options.windows, ks, places, strict=True)])


@dataclasses.dataclass(frozen=True)
class Walk:
    """The tiles that a CTA visits: those of every key set in turn, all as often as `repeats`.

    Attributes:
      spans: begin, end, full_begin, full_end of each key set.
      windows: (newest, oldest) of each key set.
      places: (own, first) of each key set.
    """

    spans: tuple[tuple[jax.Array, ...], ...]
    windows: tuple[tuple[int, int], ...]
    places: tuple[tuple[jax.Array, jax.Array], ...]
    repeats: int = 1

    def counts(self) -> list[jax.Array]:
        return [end - begin for begin, end, *_ in self.spans]

    def steps(self) -> jax.Array:
        return self.repeats * functools.reduce(jnp.add, self.counts())

    def at(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(key_set, repeat, tile) of a step; repeats only with one key set."""
        (begin, *_), *more = self.spans
        if not more:
            count = self.counts()[0]
            return jnp.int32(0), lax.div(step, count), begin + lax.rem(step, count)
        count = self.counts()[0]
        late = step >= count
        tile = jnp.where(late, more[0][0] + step - count, begin + step)
        return late.astype(i32), jnp.int32(0), tile

    def pick(self, key_set: jax.Array, values: tuple[Any, ...]) -> Any:
        """values[key_set]"""
        return values[0] if len(values) == 1 else jnp.where(key_set == 0, *values)

    def mask(
        self,
        scores: jax.Array,
        key_set: jax.Array,
        tile: jax.Array,
        query: jax.Array,
        key: jax.Array,
        same: Callable[[], jax.Array] | None,
        *,
        transpose: bool = False,
    ) -> jax.Array:
        """-inf where a key is not visible, in tiles where that may be.

        `query` and `key` are the numbers of the first ones in `scores` [queries, keys] (keys,
        queries if `transpose`), same() whether they are of one document.
        """
        full_begin, full_end = (
            self.pick(key_set, tuple(span[i] for span in self.spans)) for i in (2, 3)
        )
        newest, oldest = (
            self.pick(key_set, tuple(jnp.int32(window[i]) for window in self.windows))
            for i in (0, 1)
        )
        own, first = (self.pick(key_set, tuple(place[i] for place in self.places)) for i in (0, 1))

        def masked(scores):
            # Bounds of the columns that each row sees; nothing of size `scores` outlives this.
            row = plgpu.broadcasted_iota(i32, scores.shape[:1], 0, layout=ROWS)
            column = plgpu.broadcasted_iota(i32, scores.shape, 1, layout=MATRIX)
            if transpose:  # newest <= own + query + column - (key + row) <= oldest
                low = row + (newest + key - own - query)
                high = row + (oldest + key - own - query)
                low = jnp.where(row >= first - key, low, FAR)
            else:
                low = jnp.maximum(row + (own + query - oldest - key), first - key)
                high = row + (own + query - newest - key)
            across = scores.shape[1]
            seen = (column >= along_rows(low, across)) & (column <= along_rows(high, across))
            if same is not None:
                seen &= same()
            return jnp.where(seen, scores, -jnp.inf)

        full = (tile >= full_begin) & (tile < full_end)
        return lax.cond(full, lambda scores: scores, masked, scores)


def walk_of(spans: Ref, places: Ref, b: Any, i: Any, key_sets: Any, repeats: int = 1) -> Walk:
    """The walk of tile i in row b, from spans [n, B, tiles, 4] and places [n, B, 2]."""
    number = range(len(key_sets))
    return Walk(
        tuple(tuple(spans[s, b, i, n] for n in range(4)) for s in number),
        key_sets,
        tuple((places[s, b, 0], places[s, b, 1]) for s in number),
        repeats,
    )
