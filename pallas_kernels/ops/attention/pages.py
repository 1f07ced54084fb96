"""Keys and values in pages: which page holds which piece of which row, and decoding from them.

A pool [P, page, K, D] holds the keys (another one the values) of all rows. A page belongs to at
most one row. For cuDNN the pool itself is the batch: every page is a row of its own, with the query
of the row that it belongs to, and what comes back is merged row by row. So nothing is copied, rows
of any lengths go together, and pages of nobody cost nothing.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, NamedTuple, Self

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.ops.attention import chunked, cudnn, reference
from hmf_jax.pallas_kernels.ops.attention.inputs import Token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages of a pool [P, page, K, D] hold the tokens of which rows.

    Attributes:
      table: [B, M] int32; tokens m * page .. (m + 1) * page - 1 of row b lie in page table[b, m].
        P or larger: nowhere. No page is named twice.
      owner: [P] int32, the row of each page; B: nobody's.
      first: [P] int32, the index in its row of a page's first token.
    """

    table: jax.Array
    owner: jax.Array
    first: jax.Array

    @classmethod
    def of(cls, table: jax.Array, pages: int, page: int) -> Self:
        """The table [B, M] of a pool of so many pages, each of `page` tokens."""
        B, M = table.shape
        table = jnp.asarray(table, jnp.int32)
        rows = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, M))
        starts = jnp.broadcast_to(page * jnp.arange(M, dtype=jnp.int32), (B, M))
        owner = jnp.full(pages, B, jnp.int32).at[table].set(rows, mode="drop")
        first = jnp.zeros(pages, jnp.int32).at[table].set(starts, mode="drop")
        return cls(table, owner, first)

    def write(self, pool: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
        """pool [P, page, K, D] with values [B, T, K, D] at the tokens `slots` [B, T] of their rows.

        A token that no page is there for is dropped; so is one whose slot is negative.
        """
        P, page = pool.shape[:2]
        piece = jnp.where(slots >= 0, slots // page, self.table.shape[1])
        at = jax.vmap(lambda row, m: row.at[m].get(mode="fill", fill_value=P))(self.table, piece)
        return pool.at[at, slots % page].set(values.astype(pool.dtype), mode="drop")

    def read(self, pool: jax.Array, lengths: jax.Array) -> jax.Array:
        """The first `lengths` [B] tokens of every row, [B, M * page, K, D]; then zeros."""
        B, M = self.table.shape
        rows = pool.at[self.table].get(mode="fill", fill_value=0)
        rows = rows.reshape(B, M * pool.shape[1], *pool.shape[2:])
        filled = jnp.arange(rows.shape[1]) < lengths[:, None]
        return jnp.where(filled[:, :, None, None], rows, 0)


class Paged(NamedTuple):
    """One query of every row, and pools. `b` splits rows and pages alike: see `localise`.

    Attributes:
      q: [B, H, D].
      k, v: [P, page, K, D].
      table, owner, first: of a `PageTable`.
      lengths: [B] integers, tokens of each row.
    """

    q: Annotated[jax.Array, "bhd"]
    k: Annotated[jax.Array, "bskd"]
    v: Annotated[jax.Array, "bskd"]
    table: Annotated[jax.Array, "bm"]
    owner: Annotated[jax.Array, "b"]
    first: Annotated[jax.Array, "b"]
    lengths: Annotated[jax.Array, "b"]


def localise(inputs: Paged, axes: tuple[str, ...]) -> Paged:
    """On a device of a mesh whose `axes` split the rows: with its own numbers of rows and pages.

    A row's pages lie on the device that has the row.
    """
    if not axes:
        return inputs
    part, B, P = jax.lax.axis_index(axes), len(inputs.q), len(inputs.k)
    table, owner = inputs.table - part * P, inputs.owner - part * B
    return inputs._replace(
        table=jnp.where((table >= 0) & (table < P), table, P),
        owner=jnp.where((owner >= 0) & (owner < B), owner, B),
    )


def by_rows(inputs: Paged, *, scale: float, axes: tuple[str, ...], exact: bool) -> jax.Array:
    """`paged_decode_attention` on any device: the pages of every row are gathered first."""
    inputs = localise(inputs, axes)
    rows = partial(PageTable(*inputs[3:6]).read, lengths=inputs.lengths)
    token = Token(inputs.q, rows(inputs.k), rows(inputs.v), inputs.lengths)
    return (reference if exact else chunked).decode_attention(token, scale=scale)


def by_pages(inputs: Paged, *, scale: float, axes: tuple[str, ...]) -> jax.Array:
    """`paged_decode_attention` by cuDNN."""
    q, k, v, table, owner, first, lengths = localise(inputs, axes)
    (B, H, D), (P, page) = q.shape, k.shape[:2]
    M, lengths = table.shape[1], jnp.asarray(lengths, jnp.int32)
    total = lengths.at[owner].get(mode="fill", fill_value=0)
    o, lse = cudnn.with_lse(
        q[jnp.minimum(owner, B - 1)][:, None],
        k,
        v,
        scale=scale,
        lengths=jnp.clip(total - first, 0, page),
    )
    used = (table < P) & (page * jnp.arange(M) < lengths[:, None])
    at = jnp.where(used, table, 0)
    lse = jnp.where(used[:, :, None], lse.reshape(P, H)[at], -jnp.inf)
    share = jnp.where(used[:, :, None], jax.nn.softmax(lse, axis=1), 0)[..., None]
    parts = jnp.where(used[..., None, None], o.reshape(P, H, D)[at].astype(jnp.float32), 0)
    return jnp.sum(share * parts, axis=1).astype(v.dtype)
