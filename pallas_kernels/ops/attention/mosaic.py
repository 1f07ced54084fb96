"""Causal softmax attention on Hopper GPUs: Pallas Mosaic kernels, forward and backward.

One softmax over one or more key sets, as in chunked.py: full attention, a sliding window, queries
that continue a cache and packed documents are one key set; B'MOJO-F is two, walked one after the
other with a single online softmax (FlashAttention, Dao et al. 2022).

    forward   per tile of queries:  o = sum_j p_j v_j,  p_j = exp(scale q . k_j - lse)
    dq        per tile of queries:  ds_j = p_j (do . v_j - do . o),  dq = scale sum_j ds_j k_j
    dkv       per tile of keys:     dk = scale sum_i ds_i q_i,  dv = sum_i p_i do_i

The backward pass recomputes p from the log-sum-exp of the joint softmax, so every key set has its
own kernels and no result is written twice. A CTA has two warpgroups of 64 rows that compute and one
that fills a ring of tiles in shared memory by TMA. q, k, v are read as they lie in memory
[B, T, heads, D]. Which tiles a row of tiles can see, and which of them need no mask, is known
before (mosaic_tiles.py). Products have bfloat16 operands and float32 accumulators.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import kept, why_no_hopper
from hmf_jax.pallas_kernels.ops.attention.chunked import KeySet, make_key_sets
from hmf_jax.pallas_kernels.ops.attention.inputs import Inputs
from hmf_jax.pallas_kernels.ops.attention.mosaic_backward import dkv, dq
from hmf_jax.pallas_kernels.ops.attention.mosaic_forward import forward
from hmf_jax.pallas_kernels.ops.attention.mosaic_tiles import FAR, TILE, Options, bf16, f32, i32


def attention(
    inputs: Inputs,
    *,
    window: int | None,
    past: int | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """`pallas_kernels.attention` on Hopper.

    Raises:
      ValueError: not bfloat16, a head_dim other than 64 and 128, a scale that is not positive.
    """
    key_sets = make_key_sets(inputs, window=window, past=past)
    return joint_attention(key_sets, scale, interpret=interpret)


def why_not(scale: float, *arrays: jax.Array | None) -> str | None:
    """Why the kernels cannot run these queries, keys and values here; None if they can."""
    return why_no_hopper() or _unsupported(scale, *arrays)


def _unsupported(scale: float, *arrays: jax.Array | None) -> str | None:
    if scale <= 0:
        return f"its kernels take a positive scale, got {scale}"
    given = [x for x in arrays if x is not None]
    if given[0].shape[-1] not in (64, 128):
        return f"its kernels take head_dim 64 and 128, got {given[0].shape[-1]}"
    if any(jnp.dtype(x.dtype) != bf16 for x in given):
        return f"its kernels take bfloat16, got {', '.join(str(x.dtype) for x in given)}"
    return None


def joint_attention(
    key_sets: tuple[KeySet, ...], scale: float, *, interpret: bool = False
) -> jax.Array:
    """Softmax over the union of what each query sees in one or two key sets, as in chunked.py.

    Key sets that hold the same array of queries share its loads and its gradient.
    """
    for s in key_sets:
        if reason := _unsupported(scale, s.q, s.k, s.v):
            raise ValueError(f"attention, impl 'mosaic': {reason}.")
    length, doc = key_sets[0].q.shape[1], key_sets[0].doc

    def whole(x: jax.Array, filled: jax.Array | None) -> jax.Array:
        """x with zeros where nothing may be read, and up to a multiple of the tile."""
        if filled is not None:
            x = jnp.where(filled[:, :, None, None], x, 0)
        rest = -x.shape[1] % TILE
        return jnp.pad(x, [(0, 0), (0, rest), (0, 0), (0, 0)]) if rest else x

    real = None if doc is None else doc != 0
    qs = [key_sets[0].q]
    if any(s.q is not qs[0] for s in key_sets[1:]):
        qs = [s.q for s in key_sets]
    ks, vs = [], []
    for s in key_sets:
        filled = real
        if s.k.shape[1] != length:  # a cache: whatever lies in its empty entries
            entry = jnp.arange(s.k.shape[1])
            filled = (entry >= s.first[:, None]) & (entry <= s.last[:, None])
        ks.append(whole(s.k, filled))
        vs.append(whole(s.v, filled))
    if doc is not None:
        doc = jnp.pad(doc.astype(i32), [(0, 0), (0, -length % TILE)])
    options = Options(
        tuple((s.newest, FAR if s.oldest is None else s.oldest) for s in key_sets),
        length,
        scale,
        interpret,
    )
    places = jnp.stack([jnp.stack([s.own, s.first], -1) for s in key_sets]).astype(i32)
    o = _attend(options, tuple(whole(q, real) for q in qs), tuple(ks), tuple(vs), places, doc)
    o = o[:, :length]
    return o if real is None else jnp.where(real[:, :, None, None], o, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, qs, ks, vs, places, doc):
    return forward(options, qs, ks, vs, places, doc)[0]


def _attend_fwd(options, qs, ks, vs, places, doc):
    o, lse = kept(forward(options, qs, ks, vs, places, doc))
    return o, (qs, ks, vs, places, doc, o, lse)


def _attend_bwd(options, saved, do):
    qs, ks, vs, places, doc, o, lse = saved
    delta = jnp.swapaxes(jnp.sum(do.astype(f32) * o.astype(f32), -1), 1, 2)
    rest = (doc, do, lse, delta)
    if len(qs) == 1:
        dqs = (dq(options, qs[0], ks, vs, places, *rest),)
    else:
        dqs = tuple(
            dq(options.only(s), q, ks[s : s + 1], vs[s : s + 1], places[s : s + 1], *rest)
            for s, q in enumerate(qs)
        )
    dks, dvs = zip(
        *(
            dkv(options.only(s), qs[s % len(qs)], k, v, places[s : s + 1], *rest)
            for s, (k, v) in enumerate(zip(ks, vs, strict=True))
        ),
        strict=True,
    )
    return dqs, dks, dvs, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
