"""Causal softmax attention: full, sliding window, continued from a cache, and decode."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import sharded
from hmf_jax.pallas_kernels.dispatch import check_whole, finite, resolve
from hmf_jax.pallas_kernels.ops.attention import chunked, cudnn, mosaic, reference
from hmf_jax.pallas_kernels.ops.attention.inputs import Inputs, Token
from hmf_jax.pallas_kernels.ops.attention.pages import Paged, PageTable, by_pages, by_rows

__all__ = ["attention", "decode_attention", "paged_decode_attention"]

_IMPLS = {"cudnn": cudnn, "mosaic": mosaic, "chunked": chunked, "reference": reference}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    offset: jax.Array | None = None,
    past: int | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Causal attention; query i sees key j when i - window < j <= i, by token index.

    The keys lie in one of three ways:
      * `offset` None: they are the queries' own tokens (S == T). `segment_ids` separates packed
        documents and marks padding.
      * `offset` alone: they are a cache, entry j holding token j, that already contains the new
        tokens; query i is token offset + i.
      * `offset` and `past`: `past` older tokens in chronological order, then the T new ones
        (S == past + T); entry j holds token offset - past + j and is empty if that is negative.

    Args:
      q: [B, T, H, D] queries; any T >= 1.
      k, v: [B, S, K, D] keys and values; K divides H, query head e reads head e // (H // K).
      window: keys a query sees, itself included; None for all. Counts tokens of the row, padding
        inside a document included.
      offset: [B] integers, token index of each row's first query.
      past: number of older tokens in front of the new ones; needs `offset`.
      segment_ids: [B, T] integers, 0 = padding, a change starts a new document; not with `offset`.
      lengths: [B] integers, leading tokens that are valid, the rest being padding; not with
        `offset`. Unlike `segment_ids` they leave cuDNN possible.
      scale: factor of the scores; D ** -0.5 by default.
      impl: "auto", "cudnn" (NVIDIA, 16-bit, D <= 128, on Hopper also 256, own tokens, no
        segment_ids), "mosaic" (NVIDIA Hopper, bfloat16, D 64 or 128, positive scale), "chunked"
        (any device, memory linear in T and S) or "reference" (dense).
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`) or None.

    Returns:
      [B, T, H, D] in the dtype of v. Zero for padding and for queries that see no key. The softmax
      is float32 (float64 for float64 inputs). Reverse-mode differentiable in q, k, v.

    Raises:
      ValueError: shapes that do not fit, packing together with `offset`, an `impl` that cannot run.
    """
    check_heads(q, k, v)
    check_alignment(q, k, offset, segment_ids, lengths, past)
    if window is not None:
        check_whole("attention", "window", window)
    scale = finite("attention", "scale", scale, q.shape[-1] ** -0.5)
    inputs = Inputs(q, k, v, offset, segment_ids, lengths)
    usable = {
        "cudnn": cudnn.why_not(inputs),
        "mosaic": mosaic.why_not(scale, q, k, v),
        "chunked": None,
        "reference": None,
    }
    run = _IMPLS[resolve("attention", impl, usable)].attention
    run = partial(run, window=window, past=past, scale=scale)
    return sharded.run(run, mesh, inputs, "bthd")


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """One query per row against the first `lengths` entries of a buffer, in any order.

    Args:
      q: [B, H, D] queries.
      k, v: [B, S, K, D] buffers (a cache, or a ring), the new token included; K divides H.
      lengths: [B] integers, entries in use.
      scale: factor of the scores; D ** -0.5 by default.
      impl: "auto", "cudnn" (NVIDIA, 16-bit, D as in `attention`), "chunked" or "reference".
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`) or None.

    Returns:
      [B, H, D] in the dtype of v; zero where `lengths` is 0.

    Raises:
      ValueError: shapes that do not fit, an `impl` that cannot run.
    """
    check_ndim("q", q, 3, "[B, H, D]")
    check_heads(q[:, None], k, v)
    check_rows("lengths", lengths, q.shape[0])
    scale = finite("decode_attention", "scale", scale, q.shape[-1] ** -0.5)
    token = Token(q, k, v, lengths)
    usable = {"cudnn": cudnn.why_not(token), "chunked": None, "reference": None}
    run = _IMPLS[resolve("decode_attention", impl, usable)].decode_attention
    return sharded.run(partial(run, scale=scale), mesh, token, "bhd")


def paged_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: PageTable,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """`decode_attention` of rows whose keys and values lie in pages of a pool.

    Args:
      q: [B, H, D] queries.
      k, v: [P, page, K, D] pools of pages, the new tokens included; K divides H. A mesh that
        splits the rows (dp, fsdp) splits the pages into as many parts, and a row uses pages of its
        own part only.
      pages: which page holds what, see `PageTable`.
      lengths: [B] integers, tokens of each row; 0: it takes no time, nor do its pages.
      scale: factor of the scores; D ** -0.5 by default.
      impl: "auto", "cudnn" (NVIDIA, 16-bit, D as in `attention`; reads the pages where they are),
        "chunked" or "reference" (any device; gather the pages first). What lies behind a row's
        tokens must be finite for "cudnn".
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`) or None.

    Returns:
      [B, H, D] in the dtype of v; zero where `lengths` is 0. "cudnn" has no gradient.

    Raises:
      ValueError: shapes that do not fit, an `impl` that cannot run.
    """
    check_ndim("q", q, 3, "[B, H, D]")
    B, P = q.shape[0], k.shape[0]
    query: Any = jax.ShapeDtypeStruct((P, 1, *q.shape[1:]), q.dtype)  # as every page sees it
    check_heads(query, k, v)
    check_rows("lengths", lengths, B)
    if pages.table.ndim != 2 or len(pages.table) != B or pages.owner.shape != (P,):
        raise ValueError(
            f"pages must be the table of {B} rows and {P} pages, PageTable.of(table, {P}, "
            f"{k.shape[1]}), got one of shapes {pages.table.shape} and {pages.owner.shape}."
        )
    axes = ()
    if mesh is not None and mesh.size > 1:
        axes = sharded.batch_axes(mesh, B)
        if axes and P % sharded.batch_parts(mesh):
            raise ValueError(f"the mesh splits {B} rows, but {P} pages do not divide as well.")
    scale = finite("paged_decode_attention", "scale", scale, q.shape[-1] ** -0.5)
    inputs = Paged(q, k, v, pages.table, pages.owner, pages.first, lengths)
    hidden = None if cudnn.internals is not None else "this jax hides what could be merged"
    usable = {"cudnn": cudnn.why_not(Token(q, k, v, lengths)) or hidden}
    name = resolve("paged_decode_attention", impl, usable | {"chunked": None, "reference": None})
    if name == "cudnn":
        run = partial(by_pages, scale=scale, axes=axes)
    else:
        run = partial(by_rows, scale=scale, axes=axes, exact=name == "reference")
    return sharded.run(run, mesh, inputs, "bhd")


def check_ndim(name: str, x: jax.Array, ndim: int, dims: str) -> None:
    if x.ndim != ndim:
        raise ValueError(f"{name} must be {dims}, got shape {x.shape}.")


def check_rows(name: str, x: jax.Array | None, batch: int) -> None:
    if x is not None and x.shape != (batch,):
        raise ValueError(f"{name} must hold one integer per row, [{batch}], got shape {x.shape}.")


def check_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    """q [B, T, H, D] fits k and v [B, S, K, D] with K dividing H."""
    q_name, k_name, v_name = names
    check_ndim(q_name, q, 4, "[B, T, H, D]")
    check_ndim(k_name, k, 4, "[B, S, K, D]")
    batch, length, heads, dim = q.shape
    if length < 1 or k.shape[1] < 1:
        raise ValueError(
            f"{q_name} and {k_name} must hold a token, got shapes {q.shape} and {k.shape}."
        )
    if (k.shape[0], k.shape[3]) != (batch, dim) or heads % max(k.shape[2], 1):
        raise ValueError(
            f"{k_name} must be [{batch}, S, K, {dim}] with K dividing the {heads} heads of "
            f"{q_name}, got shape {k.shape}."
        )
    if v.shape != k.shape:
        raise ValueError(f"{v_name} must have the shape of {k_name}, {k.shape}, got {v.shape}.")


def check_alignment(
    q: jax.Array,
    k: jax.Array,
    offset: jax.Array | None,
    segment_ids: jax.Array | None,
    lengths: jax.Array | None,
    past: int | None,
    name: str = "k",
) -> None:
    """S, masks and offset agree on one of the alignments of `attention`."""
    batch, length = q.shape[:2]
    check_rows("offset", offset, batch)
    check_rows("lengths", lengths, batch)
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [{batch}, {length}], got shape {segment_ids.shape}.")
    if offset is None:
        if past is not None:
            raise ValueError(f"past={past} needs offset, the index of each row's first query.")
        past = 0
    elif segment_ids is not None or lengths is not None:
        raise ValueError(
            "segment_ids and lengths describe tokens that attend to each other only; with "
            "offset, rows continue one document: leave them None."
        )
    if past is not None and (past < 0 or k.shape[1] != past + length):
        raise ValueError(
            f"{name} must hold {past} past and {length} new tokens, [B, {past + length}, K, D], "
            f"got shape {k.shape}."
        )
