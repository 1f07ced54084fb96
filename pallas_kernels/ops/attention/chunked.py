"""Causal attention in plain jnp, blocked: exact, any device, memory linear in the length.

Everything here is one softmax over one or more *key sets*: keys and values, the queries that score
them, and how far back those queries look. Full attention and a sliding window are one key set,
B'MOJO-F is two (in-context and fading keys compete in the same softmax), decode is one with one
query.

Blocks of queries walk the blocks of keys they can see with the online softmax of FlashAttention
(Dao et al. 2022); the backward pass recomputes the probabilities from the log-sum-exp of the joint
softmax. It is written out (custom_vjp) because differentiating the loops would add a gradient of
the size of the whole cache for every block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import kept
from hmf_jax.pallas_kernels.ops.attention.inputs import Inputs, Token
from hmf_jax.pallas_kernels.segments import documents, leading

QUERY_BLOCK = 256
KEY_BLOCK = 16384
SCORES_PER_BLOCK = 2**18  # queries times keys, per batch row and head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeySet:
    """Keys that take part in a softmax, and where they lie relative to the queries.

    Attributes:
      q: [B, T, H, D] queries.
      k, v: [B, S, K, D] keys and values; K divides H, query head e reads head e // (H // K).
      own: [B] int32, the entry of `k` that belongs to query 0's token; query i's is own + i.
      first, last: [B] int32, the entries first <= entry <= last of `k` are filled.
      doc: [B, T] int32 or None; a query sees its own document only. Needs S == T, own == 0.
      newest, oldest: query i sees the entries own + i - d with newest <= d <= oldest
        (oldest None: no limit).
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    own: jax.Array
    first: jax.Array
    last: jax.Array
    doc: jax.Array | None = None
    newest: int = field(default=0, metadata={"static": True})
    oldest: int | None = field(default=None, metadata={"static": True})


def make_key_set(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    newest: int = 0,
    oldest: int | None = None,
    offset: jax.Array | None = None,
    past: int | None = None,
    doc: jax.Array | None = None,
) -> KeySet:
    """A key set in an alignment of `pallas_kernels.attention` (own tokens, cache, past)."""
    zero = jnp.zeros(q.shape[:1], jnp.int32)
    if offset is None:
        own, first = zero, zero
    elif past is None:
        own, first = offset.astype(jnp.int32), zero
    else:
        own, first = zero + past, jnp.maximum(past - offset.astype(jnp.int32), 0)
    return KeySet(q, k, v, own, first, own + q.shape[1] - 1, doc, newest, oldest)


def document_ids(
    segment_ids: jax.Array | None, lengths: jax.Array | None, length: int
) -> jax.Array | None:
    """[B, T] int32 document numbers from 1, 0 at padding; None if nothing needs masking."""
    doc = None
    if segment_ids is not None:
        number, valid = documents(segment_ids)
        doc = jnp.where(valid, number + 1, 0)
    if lengths is not None:
        doc = jnp.where(leading(lengths, length), 1 if doc is None else doc, 0)
    return doc


def make_key_sets(inputs: Inputs, *, window: int | None, past: int | None) -> tuple[KeySet, ...]:
    """The one key set of `attention`."""
    q, k, v, offset, segment_ids, lengths = inputs
    doc = document_ids(segment_ids, lengths, q.shape[1])
    oldest = None if window is None else window - 1
    return (make_key_set(q, k, v, oldest=oldest, offset=offset, past=past, doc=doc),)


def attention(inputs: Inputs, *, window: int | None, past: int | None, scale: float) -> jax.Array:
    """Blocked version of `pallas_kernels.attention`."""
    return joint_attention(make_key_sets(inputs, window=window, past=past), scale)


def decode_attention(token: Token, *, scale: float) -> jax.Array:
    """Blocked version of `pallas_kernels.decode_attention`."""
    key_set = make_key_set(token.q[:, None], token.k, token.v, offset=token.lengths - 1)
    return joint_attention((key_set,), scale)[:, 0]


def joint_attention(key_sets: tuple[KeySet, ...], scale: float) -> jax.Array:
    """Softmax over the union of what each query sees in all key sets.

    Scores, softmax and sums are float32 (float64 for float64 inputs); as in FlashAttention the
    probabilities are rounded to the dtype of the values before they meet them.

    Args:
      key_sets: one or more, with queries of one shape, values of one dtype and the same `doc`.
      scale: factor of the scores.

    Returns:
      [B, T, H, D] in the dtype of the values; zero at padding and for queries that see nothing.
    """
    length = key_sets[0].q.shape[1]
    key_sets = tuple(
        replace(s, q=_whole_blocks(s.q), doc=None if s.doc is None else _whole_blocks(s.doc))
        for s in key_sets
    )
    doc = key_sets[0].doc
    if doc is None:
        return _attend(key_sets, scale)[:, :length]
    # Padding is blanked here rather than in the blocks: nothing it holds, and no cotangent that
    # arrives there, may reach a sum.
    real = (doc != 0)[:, :, None, None]
    own = real[:, :length]
    key_sets = tuple(
        replace(s, q=jnp.where(real, s.q, 0), k=jnp.where(own, s.k, 0), v=jnp.where(own, s.v, 0))
        for s in key_sets
    )
    return jnp.where(real, _attend(key_sets, scale), 0)[:, :length]


def _whole_blocks(x: jax.Array) -> jax.Array:
    """Zeros after axis 1, up to a multiple of the query block."""
    rest = -x.shape[1] % min(x.shape[1], QUERY_BLOCK)
    return jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(key_sets: tuple[KeySet, ...], scale: float) -> jax.Array:
    return _forward(key_sets, scale)[0]


def _attend_fwd(key_sets: tuple[KeySet, ...], scale: float) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = kept(_forward(key_sets, scale))
    return out, (key_sets, out, lse)


def _attend_bwd(
    scale: float, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[tuple[KeySet, ...]]:
    key_sets, out, lse = saved
    return (tuple(_backward(key_set, scale, out, lse, d_out) for key_set in key_sets),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(key_sets: tuple[KeySet, ...], scale: float) -> tuple[jax.Array, jax.Array]:
    """Output, and log-sum-exp as [blocks, B, K, G, block] where G = H // K."""
    batch, length, heads, dim = key_sets[0].q.shape
    kv_heads, dtype = key_sets[0].k.shape[2], key_sets[0].v.dtype
    acc = jnp.promote_types(dtype, jnp.float32)
    block = min(length, QUERY_BLOCK)
    rows = (batch, kv_heads, heads // kv_heads, block)

    def absorb(state, q, k, v, visible, at):
        """One step of the online softmax: running maximum, sum and unnormalised output."""
        top, total, out = state
        s = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=acc) * scale
        s = jnp.where(visible, s, jnp.finfo(acc).min)
        new_top = jnp.maximum(top, s.max(-1))
        p = jnp.where(visible, jnp.exp(s - new_top[..., None]), 0)
        shrink = jnp.exp(top - new_top)
        p_v = jnp.einsum("bkgts,bskd->bkgtd", p.astype(dtype), v, preferred_element_type=acc)
        return new_top, total * shrink + p.sum(-1), out * shrink[..., None] + p_v

    def query_block(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        top = jnp.full(rows, jnp.finfo(acc).min, acc)
        state = top, jnp.zeros(rows, acc), jnp.zeros((*rows, dim), acc)
        for key_set in key_sets:
            state = _walk(key_set, start, block, absorb, state)
        top, total, out = state
        total = jnp.where(total > 0, total, 1)
        out = jnp.moveaxis(out / total[..., None], 3, 1).reshape(batch, block, heads, dim)
        return out.astype(dtype), top + jnp.log(total)

    out, lse = jax.lax.map(query_block, jnp.arange(0, length, block))
    return _unblock(out), lse


def _backward(
    key_set: KeySet, scale: float, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> KeySet:
    """Gradients of one key set given the output and log-sum-exp of the joint softmax.

    With p = exp(s - lse): dv = p' do, ds = p (do v' - do . o), dq = ds k, dk = ds' q.
    """
    length, kv_heads, acc = out.shape[1], key_set.k.shape[2], lse.dtype
    block = min(length, QUERY_BLOCK)

    def query_block(grads, xs):
        start, lse = xs
        do = _rows(d_out, start, block, kv_heads)
        o = _rows(out, start, block, kv_heads)
        dot = jnp.einsum("btkgd,btkgd->bkgt", do, o, preferred_element_type=acc)[..., None]

        def step(state, q, k, v, visible, at):
            d_q, d_k, d_v = state
            s = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=acc) * scale
            p = jnp.where(visible, jnp.exp(s - lse[..., None]), 0)
            d_p = jnp.einsum("btkgd,bskd->bkgts", do, v, preferred_element_type=acc)
            d_s = (p * (d_p - dot) * scale).astype(k.dtype)
            p = p.astype(v.dtype)
            part_v = jnp.einsum("bkgts,btkgd->bskd", p, do, preferred_element_type=acc)
            part_k = jnp.einsum("bkgts,btkgd->bskd", d_s, q, preferred_element_type=acc)
            part_q = jnp.einsum("bkgts,bskd->btkgd", d_s, k, preferred_element_type=acc)
            return d_q + part_q, _add_at(d_k, part_k, at), _add_at(d_v, part_v, at)

        d_q, *grads = _walk(key_set, start, block, step, (jnp.zeros(o.shape, acc), *grads))
        d_q = d_q.reshape(*d_q.shape[:2], -1, d_q.shape[-1])
        return grads, d_q.astype(key_set.q.dtype)

    zeros = jnp.zeros(key_set.k.shape, acc)
    (d_k, d_v), d_q = jax.lax.scan(query_block, [zeros, zeros], (jnp.arange(0, length, block), lse))
    return replace(
        key_set,
        q=_unblock(d_q),
        k=d_k.astype(key_set.k.dtype),
        v=d_v.astype(key_set.v.dtype),
        own=None,
        first=None,
        last=None,
        doc=None,
    )


def _walk(
    key_set: KeySet, start: jax.Array, block: int, step: Callable[..., Any], state: Any
) -> Any:
    """Apply `step(state, q, k, v, visible, at)` to all keys that a block of queries can see.

    q [B, block, K, G, D]; k, v [B, keys, K, D], the entries from `at`; visible
    [B, 1, 1, block, keys]. Empty entries are zeros, whatever the buffer holds there.
    """
    capacity, kv_heads = key_set.k.shape[1:3]
    reach = capacity
    if key_set.oldest is not None:
        reach = min(reach, block + key_set.oldest - key_set.newest)
    keys = -(-reach // -(-reach // min(SCORES_PER_BLOCK // block, KEY_BLOCK)))  # equal parts

    q = _rows(key_set.q, start, block, kv_heads)
    own = key_set.own[:, None] + start + jnp.arange(block)

    def visit(begin: jax.Array, state: Any) -> Any:
        at = jnp.minimum(begin, capacity - keys)  # the last block may overlap the one before
        entry = at + jnp.arange(keys)
        filled = (entry >= key_set.first[:, None]) & (entry <= key_set.last[:, None])
        distance = own[:, :, None] - entry
        visible = (distance >= key_set.newest) & (filled & (entry >= begin))[:, None]
        if key_set.oldest is not None:
            visible = visible & (distance <= key_set.oldest)
        if key_set.doc is not None:
            doc = _slice(key_set.doc, start, block)[:, :, None]
            visible = visible & (doc == _slice(key_set.doc, at, keys)[:, None])
        filled = filled[:, :, None, None]
        k, v = (jnp.where(filled, _slice(x, at, keys), 0) for x in (key_set.k, key_set.v))
        return step(state, q, k, v, visible[:, None, None], at)

    if keys == capacity:
        return visit(jnp.int32(0), state)
    end = jnp.minimum(jnp.max(own) - key_set.newest + 1, capacity)
    begin = jnp.min(key_set.first)
    if key_set.oldest is not None:
        begin = jnp.maximum(begin, jnp.min(own) - key_set.oldest)
    trips = jnp.maximum((end - begin + keys - 1) // keys, 0)
    return jax.lax.fori_loop(0, trips, lambda i, state: visit(begin + i * keys, state), state)


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _rows(x: jax.Array, start: jax.Array, size: int, kv_heads: int) -> jax.Array:
    """[B, size, K, G, D] of [B, T, H, D]."""
    x = _slice(x, start, size)
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1])


def _unblock(x: jax.Array) -> jax.Array:
    """[blocks, B, block, ...] to [B, T, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _add_at(x: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    part = _slice(x, at, part.shape[1]) + part
    return jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=1)
