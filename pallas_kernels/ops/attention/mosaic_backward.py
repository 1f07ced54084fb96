"""Backward kernels of attention on Hopper: see mosaic.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.mosaic import (
    COLUMNS,
    Warpgroup,
    accumulator,
    along_columns,
    along_rows,
    kernel,
    tile,
    transposed,
    vector,
)
from hmf_jax.pallas_kernels.ops.attention.mosaic_forward import (
    fill,
    given,
    load_keys,
    ring,
    roles,
    zeros,
)
from hmf_jax.pallas_kernels.ops.attention.mosaic_tiles import (
    LOG2E,
    TILE,
    M,
    Options,
    Ref,
    bf16,
    f32,
    i32,
    spans_of,
    walk_of,
)


def dq(
    options: Options,
    q: jax.Array,
    ks: tuple[jax.Array, ...],
    vs: tuple[jax.Array, ...],
    places: jax.Array,
    doc: jax.Array | None,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> jax.Array:
    """Gradient of queries through the key sets they read.

    Args: as `forward`; do like q; lse of the joint softmax and delta = do . o, float32 [B, H, T].
    """
    (B, T, H, D), packed = q.shape, doc is not None
    keys, stages = TILE, 2  # of a tile, and tiles whose loads are in flight
    scratch = {
        "q_s": tile((2, M, D)),
        "do_s": tile((2, M, D)),
        "k_s": tile((stages, keys, D)),
        "v_s": tile((stages, keys, D)),
        "lse_s": plgpu.SMEM((2, M), f32),
        "delta_s": plgpu.SMEM((2, M), f32),
        "q_full": plgpu.Barrier(num_arrivals=4 + packed, num_barriers=2),
        "k_ring": ring(stages, 1 + packed),
        "v_ring": ring(stages, 1),
    }
    if packed:
        scratch |= {"doc_q": plgpu.SMEM((2, M), i32), "doc_k": plgpu.SMEM((stages, keys), i32)}
    if options.interpret:
        scratch["room"] = tile((2, M, keys))
    spans = spans_of(options, q, ks, places, doc, TILE, keys)
    return kernel(
        _attention_dq,
        out=jax.ShapeDtypeStruct(q.shape, bf16),
        grid={"h": H, "i": T // TILE, "b": B},
        scratch=scratch,
        interpret=options.interpret,
        warpgroups=3,
        windows=options.windows,
        scale=options.scale,
    )(q, *ks, *vs, do, lse, delta, spans, places, *given(doc))


def _attention_dq(
    *refs: Ref, windows: Any, scale: float, wg: Warpgroup,
    q_s, do_s, k_s, v_s, lse_s, delta_s, q_full, k_ring, v_ring,
    doc_q: Ref = None, doc_k: Ref = None, room: Ref = None,
) -> None:  # fmt: skip
    n = len(windows)
    q_g, k_gs, v_gs = refs[0], refs[1 : 1 + n], refs[1 + n :][:n]
    do_g, lse_g, delta_g, spans_g, places_g, *doc_g, dq_g = refs[1 + 2 * n :]
    tiles, (stages, keys, D) = q_g.shape[1] // TILE, k_s.shape
    h, i, b = lax.axis_index("h"), tiles - 1 - lax.axis_index("i"), lax.axis_index("b")
    kv = h // (q_g.shape[2] // k_gs[0].shape[2])
    walk = walk_of(spans_g, places_g, b, i, windows)

    def compute(w: jax.Array) -> None:
        start = i * TILE + w * M
        mine = pl.ds(start, M)
        plgpu.copy_gmem_to_smem(q_g.at[b, mine, h], q_s.at[w], q_full.at[w])
        plgpu.copy_gmem_to_smem(do_g.at[b, mine, h], do_s.at[w], q_full.at[w])
        plgpu.copy_gmem_to_smem(lse_g.at[b, h, mine], lse_s.at[w], q_full.at[w])
        plgpu.copy_gmem_to_smem(delta_g.at[b, h, mine], delta_s.at[w], q_full.at[w])
        if doc_g:
            plgpu.copy_gmem_to_smem(doc_g[0].at[b, mine], doc_q.at[w], q_full.at[w])
        plgpu.barrier_wait(q_full.at[w])
        lse, delta = vector(lse_s.at[w]) * LOG2E, vector(delta_s.at[w])

        def step(t, dq):
            slot = lax.rem(t, stages)
            key_set, _, tile = walk.at(t)

            def same():
                down = along_rows(vector(doc_q.at[w]), keys)
                return down == along_columns(vector(doc_k.at[slot], COLUMNS), M)

            def gradient(scores, products):
                plgpu.barrier_wait(k_ring["full"].at[slot])
                plgpu.wgmma(scores, q_s.at[w], transposed(k_s.at[slot]))
                plgpu.barrier_wait(v_ring["full"].at[slot])
                plgpu.wgmma(products, do_s.at[w], transposed(v_s.at[slot]))
                s = wg.before_last(scores)
                s = walk.mask(s, key_set, tile, start, tile * keys, same if doc_g else None)
                p = jnp.exp2(s * (scale * LOG2E) - along_rows(lse, keys))
                return p * (products[...] - along_rows(delta, keys))

            ds = pl.run_scoped(gradient, accumulator((M, keys)), accumulator((M, keys)))
            plgpu.barrier_arrive(v_ring["free"].at[slot])
            left = wg.operand(ds, None if room is None else room.at[w])
            dq = wg.accumulate(dq, lambda acc: plgpu.wgmma(acc, left, k_s.at[slot]))
            plgpu.barrier_arrive(k_ring["free"].at[slot])
            return dq

        q_s[w] = (lax.fori_loop(0, walk.steps(), step, zeros(M, D)) * scale).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[w], dq_g.at[b, mine, h])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        load_keys(walk, k_gs, v_gs, doc_g, b, kv, k_s, v_s, doc_k, k_ring, v_ring)

    roles(compute, load)


def dkv(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: jax.Array,
    doc: jax.Array | None,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the keys and values of one key set; arguments as those of `dq`."""
    (B, _, _, D), packed = q.shape, doc is not None
    queries, stages = M, 4
    scratch = {
        "k_s": tile((2, M, D)),
        "v_s": tile((2, M, D)),
        "q_s": tile((stages, queries, D)),
        "do_s": tile((stages, queries, D)),
        "lse_s": plgpu.SMEM((stages, queries), f32),
        "delta_s": plgpu.SMEM((stages, queries), f32),
        "k_full": plgpu.Barrier(num_arrivals=2 + packed, num_barriers=2),
        "q_ring": ring(stages, 2 + packed),
        "do_ring": ring(stages, 2),
    }
    if packed:
        scratch |= {"doc_k": plgpu.SMEM((2, M), i32), "doc_q": plgpu.SMEM((stages, queries), i32)}
    if options.interpret:
        scratch["room"] = tile((2, M, queries))
    spans = spans_of(options, q, (k,), places, doc, queries, TILE, by_key=True)
    return kernel(
        _attention_dkv,
        out=(jax.ShapeDtypeStruct(k.shape, bf16), jax.ShapeDtypeStruct(v.shape, bf16)),
        grid={"h": k.shape[2], "i": k.shape[1] // TILE, "b": B},
        scratch=scratch,
        interpret=options.interpret,
        warpgroups=3,
        windows=options.windows,
        scale=options.scale,
    )(q, k, v, do, lse, delta, spans, places, *given(doc))


def _attention_dkv(
    q_g, k_g, v_g, do_g, lse_g, delta_g, spans_g, places_g, *rest: Ref,
    windows: Any, scale: float, wg: Warpgroup,
    k_s, v_s, q_s, do_s, lse_s, delta_s, k_full, q_ring, do_ring,
    doc_q: Ref = None, doc_k: Ref = None, room: Ref = None,
) -> None:  # fmt: skip
    *doc_g, dk_g, dv_g = rest
    stages, queries, D = q_s.shape
    h, i, b = lax.axis_index("h"), lax.axis_index("i"), lax.axis_index("b")
    group = q_g.shape[2] // k_g.shape[2]
    walk = walk_of(spans_g, places_g, b, i, windows, repeats=group)

    def compute(w: jax.Array) -> None:
        start = i * TILE + w * M
        mine = pl.ds(start, M)
        plgpu.copy_gmem_to_smem(k_g.at[b, mine, h], k_s.at[w], k_full.at[w])
        plgpu.copy_gmem_to_smem(v_g.at[b, mine, h], v_s.at[w], k_full.at[w])
        if doc_g:
            plgpu.copy_gmem_to_smem(doc_g[0].at[b, mine], doc_k.at[w], k_full.at[w])
        plgpu.barrier_wait(k_full.at[w])
        place = None if room is None else room.at[w]

        def step(t, carry):
            dk, dv = carry
            slot = lax.rem(t, stages)
            key_set, _, tile = walk.at(t)

            def same():
                across = along_columns(vector(doc_q.at[slot], COLUMNS), M)
                return along_rows(vector(doc_k.at[w]), queries) == across

            def gradients(scores, products):
                """p and do . v - delta, keys along rows."""
                plgpu.barrier_wait(q_ring["full"].at[slot])
                plgpu.wgmma(scores, k_s.at[w], transposed(q_s.at[slot]))
                plgpu.barrier_wait(do_ring["full"].at[slot])
                plgpu.wgmma(products, v_s.at[w], transposed(do_s.at[slot]))
                s = wg.before_last(scores)
                s = walk.mask(
                    s, key_set, tile, tile * queries, start, same if doc_g else None, transpose=True
                )
                lse = along_columns(vector(lse_s.at[slot], COLUMNS) * LOG2E, M)
                p = jnp.exp2(s * (scale * LOG2E) - lse)
                delta = along_columns(vector(delta_s.at[slot], COLUMNS), M)
                return p, products[...] - delta

            p, slope = pl.run_scoped(
                gradients, accumulator((M, queries)), accumulator((M, queries))
            )

            def add(dv, dk):  # dv runs while the operand of dk is made
                plgpu.wgmma(dv, wg.operand(p, place), do_s.at[slot])
                plgpu.wgmma(dk, wg.operand(p * slope, place), q_s.at[slot])

            dv, dk = wg.accumulate_both(dv, dk, add)
            plgpu.barrier_arrive(do_ring["free"].at[slot])
            plgpu.barrier_arrive(q_ring["free"].at[slot])
            return dk, dv

        dk, dv = lax.fori_loop(0, walk.steps(), step, (zeros(M, D), zeros(M, D)))
        k_s[w] = (dk * scale).astype(bf16)
        v_s[w] = dv.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s.at[w], dk_g.at[b, mine, h])
        plgpu.copy_smem_to_gmem(v_s.at[w], dv_g.at[b, mine, h])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        def step(t, slot):
            _, repeat, tile = walk.at(t)
            some, head = pl.ds(tile * queries, queries), h * group + repeat
            full = q_ring["full"].at[slot]
            pl.when(t >= stages)(lambda: plgpu.barrier_wait(q_ring["free"].at[slot]))
            plgpu.copy_gmem_to_smem(q_g.at[b, some, head], q_s.at[slot], full)
            plgpu.copy_gmem_to_smem(lse_g.at[b, head, some], lse_s.at[slot], full)
            if doc_g:
                plgpu.copy_gmem_to_smem(doc_g[0].at[b, some], doc_q.at[slot], full)
            full = do_ring["full"].at[slot]
            pl.when(t >= stages)(lambda: plgpu.barrier_wait(do_ring["free"].at[slot]))
            plgpu.copy_gmem_to_smem(do_g.at[b, some, head], do_s.at[slot], full)
            plgpu.copy_gmem_to_smem(delta_g.at[b, head, some], delta_s.at[slot], full)

        fill(walk.steps(), stages, step, (q_ring, do_ring))

    roles(compute, load)
