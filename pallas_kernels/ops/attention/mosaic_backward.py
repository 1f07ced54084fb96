"""Backward kernel of attention on Hopper: see mosaic.py."""

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
from hmf_jax.pallas_kernels.ops.attention.mosaic_forward import given, ring, roles, zeros
from hmf_jax.pallas_kernels.ops.attention.mosaic_tiles import (
    LOG2E,
    TILE,
    M,
    Options,
    Ref,
    bf16,
    f32,
    i32,
    last_visits,
    spans_of,
    walk_of,
)


def backward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: jax.Array,
    doc: jax.Array | None,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients through one key set.

    Args: as `forward`, with one key set; do like q; lse of the joint softmax and
      delta = do . o, float32 [B, H, T].

    Returns:
      dq [B, T, H, D] float32, the part of this key set; dk, dv like k, v.
    """
    (B, T, _, D), packed, stages = q.shape, doc is not None, 2
    queries = TILE * M // D  # of a tile: with more, the accumulators would not fit into registers
    scratch = {
        "k_s": tile((2, M, D)),
        "v_s": tile((2, M, D)),
        "q_s": tile((stages, queries, D)),
        "do_s": tile((stages, queries, D)),
        "ds_s": tile((2, 2, M, queries)),
        "dq_s": tile((2, M, M), f32),
        "lse_s": plgpu.SMEM((stages, queries), f32),
        "delta_s": plgpu.SMEM((stages, queries), f32),
        "kv_full": plgpu.Barrier(num_arrivals=2 * (2 + packed)),
        "q_ring": ring(stages, 4 + packed),
        "ds_full": plgpu.Barrier(num_arrivals=2),
        "dq_full": plgpu.Barrier(num_arrivals=2),
        "dq_free": plgpu.Barrier(),
        "k_free": plgpu.Barrier(num_arrivals=2),
    }
    if packed:
        scratch |= {"doc_k": plgpu.SMEM((2, M), i32), "doc_q": plgpu.SMEM((stages, queries), i32)}
    if options.interpret:
        scratch |= {
            "room": tile((2, M, queries)),
            "old_s": tile((2, M, M), f32),
            "old_full": plgpu.Barrier(num_arrivals=2),
        }
    spans = spans_of(options, q, (k,), places, doc, queries, TILE, by_key=True)
    spans, last = last_visits(spans, T // queries)
    dq, dk, dv = kernel(
        _attention_backward,
        out=(
            jax.ShapeDtypeStruct(q.shape, f32),
            jax.ShapeDtypeStruct(k.shape, bf16),
            jax.ShapeDtypeStruct(v.shape, bf16),
        ),
        grid={"h": k.shape[2], "i": k.shape[1] // TILE, "b": B},
        scratch=scratch,
        interpret=options.interpret,
        warpgroups=3,
        windows=options.windows,
        scale=options.scale,
    )(q, k, v, do, lse * LOG2E, delta, spans, last, places, *given(doc))
    visited = jnp.repeat(last[0] >= 0, queries, 1)[:, :, None, None]  # the rest was never written
    return jnp.where(visited, dq * options.scale, 0.0), dk, dv


def _attention_backward(
    q_g, k_g, v_g, do_g, lse_g, delta_g, spans_g, last_g, places_g, *rest: Ref,
    windows: Any, scale: float, wg: Warpgroup,
    k_s, v_s, q_s, do_s, ds_s, dq_s, lse_s, delta_s,
    kv_full, q_ring, ds_full, dq_full, dq_free, k_free,
    doc_q: Ref = None, doc_k: Ref = None, room: Ref = None, old_s: Ref = None, old_full: Ref = None,
) -> None:  # fmt: skip
    *doc_g, dq_g, dk_g, dv_g = rest
    (stages, queries, D), tiles = q_s.shape, k_g.shape[1] // TILE
    h, i, b = lax.axis_index("h"), tiles - 1 - lax.axis_index("i"), lax.axis_index("b")
    group = q_g.shape[2] // k_g.shape[2]
    walk = walk_of(spans_g, places_g, b, i, windows, repeats=group)

    def compute(w: jax.Array) -> None:
        start = i * TILE + w * M
        mine = pl.ds(start, M)
        plgpu.copy_gmem_to_smem(k_g.at[b, mine, h], k_s.at[w], kv_full)
        plgpu.copy_gmem_to_smem(v_g.at[b, mine, h], v_s.at[w], kv_full)
        if doc_g:
            plgpu.copy_gmem_to_smem(doc_g[0].at[b, mine], doc_k.at[w], kv_full)
        plgpu.barrier_wait(kv_full)
        place = None if room is None else room.at[w]
        # Of dq, a warpgroup makes M columns (D = 128) or M rows (D = 64).
        rows = pl.ds(w * M if queries > M else 0, M)
        columns = pl.ds(w * M if D > M else 0, M)

        def step(t, carry):
            dk, dv = carry
            slot, half = lax.rem(t, stages), lax.rem(t, 2)
            key_set, _, tile = walk.at(t)

            def same():
                across = along_columns(vector(doc_q.at[slot], COLUMNS), M)
                return along_rows(vector(doc_k.at[w]), queries) == across

            def add(dv, dk):
                def slopes(scores, products):
                    """p (do . v - delta), keys along rows; dv on the way."""
                    plgpu.wgmma(scores, k_s.at[w], transposed(q_s.at[slot]))
                    plgpu.wgmma(products, v_s.at[w], transposed(do_s.at[slot]))
                    s = wg.before_last(scores)
                    s = walk.mask(
                        s, key_set, tile, tile * queries, start, same if doc_g else None,
                        transpose=True,
                    )  # fmt: skip
                    lse = along_columns(vector(lse_s.at[slot], COLUMNS), M)
                    p = jnp.exp2(s * (scale * LOG2E) - lse)
                    plgpu.wgmma(dv, wg.operand(p, place), do_s.at[slot])
                    delta = along_columns(vector(delta_s.at[slot], COLUMNS), M)
                    return p * (wg.before_last(products) - delta)

                ds = pl.run_scoped(slopes, accumulator((M, queries)), accumulator((M, queries)))
                ds_s[half, w] = ds.astype(bf16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_full)
                plgpu.wgmma(dk, wg.operand(ds, place), q_s.at[slot])
                plgpu.barrier_wait(ds_full)

                def product(dq):
                    for other in range(2):
                        left = ds_s.at[half, other, :, rows]
                        plgpu.wgmma(dq, transposed(left), k_s.at[other, :, columns])
                    return dq[...]

                dq = pl.run_scoped(product, accumulator((M, M)))
                pl.when(t > 0)(lambda: plgpu.barrier_wait(dq_free))
                dq_s[w] = dq
                plgpu.commit_smem()
                plgpu.barrier_arrive(dq_full)

            plgpu.barrier_wait(q_ring["full"].at[slot])
            dv, dk = wg.accumulate_both(dv, dk, add)
            plgpu.barrier_arrive(q_ring["free"].at[slot])
            return dk, dv

        dk, dv = lax.fori_loop(0, walk.steps(), step, (zeros(M, D), zeros(M, D)))
        plgpu.barrier_arrive(k_free)
        v_s[w] = dv.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v_s.at[w], dv_g.at[b, mine, h])
        plgpu.barrier_wait(k_free)
        k_s[w] = (dk * scale).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s.at[w], dk_g.at[b, mine, h])
        pl.when(walk.steps() > 0)(lambda: plgpu.barrier_wait(dq_free))
        plgpu.wait_smem_to_gmem(0)

    def memory() -> None:
        """Load queries; add dq to what the tiles of keys after this one have left."""
        shape = q_g.shape[0], q_g.shape[2], q_g.shape[1] // queries
        turns = None if old_s is not None else pl.get_global(plgpu.SemaphoreType.REGULAR(shape))

        def load(t, slot):
            _, repeat, tile = walk.at(t)
            some, head, full = pl.ds(tile * queries, queries), h * group + repeat, q_ring["full"]
            plgpu.copy_gmem_to_smem(q_g.at[b, some, head], q_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(do_g.at[b, some, head], do_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(lse_g.at[b, head, some], lse_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(delta_g.at[b, head, some], delta_s.at[slot], full.at[slot])
            if doc_g:
                plgpu.copy_gmem_to_smem(doc_g[0].at[b, some], doc_q.at[slot], full.at[slot])

        def add(t):
            _, repeat, tile = walk.at(t)
            head = h * group + repeat
            before = last_g[0, b, tile] - i  # so many tiles of keys have their turn before this one
            targets = []
            for w in range(2):
                row, column = tile * queries + (w * M if queries > M else 0), w * M if D > M else 0
                targets.append(dq_g.at[b, pl.ds(row, M), head, pl.ds(column, M)])

            def copy(**how: Any) -> None:
                for w in range(2):
                    plgpu.copy_smem_to_gmem(dq_s.at[w], targets[w], **how)

            plgpu.barrier_wait(dq_full)
            if turns is None:  # the interpreter: one CTA after the other, no sums by copies

                @pl.when(before > 0)
                def _():
                    for w in range(2):
                        plgpu.copy_gmem_to_smem(targets[w], old_s.at[w], old_full)
                    plgpu.barrier_wait(old_full)
                    dq_s[...] += old_s[...]
                    plgpu.commit_smem()

                copy()
            else:
                plgpu.semaphore_wait(
                    turns.at[b, head, tile], before, decrement=False, memory_scope="gpu"
                )
                pl.when(before > 0)(lambda: copy(reduction_op="add"))
                pl.when(before == 0)(copy)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(dq_free)
            plgpu.wait_smem_to_gmem(0)
            if turns is not None:
                plgpu.semaphore_signal(turns.at[b, head, tile], memory_scope="gpu")

        def step(t, _):
            slot = lax.rem(t, stages)
            pl.when(t >= stages)(lambda: plgpu.barrier_wait(q_ring["free"].at[slot]))
            pl.when(t < walk.steps())(lambda: load(t, slot))
            pl.when(t >= stages)(lambda: add(t - stages))

        lax.fori_loop(0, walk.steps() + jnp.where(walk.steps() > 0, stages, 0), step, None)

    roles(compute, memory)
