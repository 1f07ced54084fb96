"""Backward kernel of attention on Hopper: see mosaic.py."""

from __future__ import annotations

from types import SimpleNamespace
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
    Walk,
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
        "k": tile((2, M, D)),
        "v": tile((2, M, D)),
        "q": tile((stages, queries, D)),
        "do": tile((stages, queries, D)),
        "ds": tile((2, 2, M, queries)),
        "dq": tile((2, M, M), f32),
        "lse": plgpu.SMEM((stages, queries), f32),
        "delta": plgpu.SMEM((stages, queries), f32),
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
            "old": tile((2, M, M), f32),
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
    q, k, v, do, lse, delta, spans, last, places, /, *rest: Ref,
    windows: Any, scale: float, wg: Warpgroup, **scratch: Ref,
) -> None:  # fmt: skip
    *doc, dq, dk, dv = rest
    tiles = k.shape[1] // TILE
    # Last keys first, which the turns of dq rely on: a CTA waits for those of later keys.
    h, i, b = lax.axis_index("h"), tiles - 1 - lax.axis_index("i"), lax.axis_index("b")
    group = q.shape[2] // k.shape[2]
    walk = walk_of(spans, places, b, i, windows, repeats=group)
    g = SimpleNamespace(
        q=q, k=k, v=v, do=do, lse=lse, delta=delta, last=last, doc=doc, dq=dq, dk=dk, dv=dv
    )
    s, place = SimpleNamespace(**scratch), (b, h, i)
    roles(lambda w: _keys(g, s, place, walk, wg, scale, w), lambda: _queries(g, s, place, walk))


def _dq_part(w: Any, queries: int, D: int) -> tuple[Any, Any]:
    """First row and column of the [M, M] part of a tile of dq that warpgroup w makes."""
    return (w * M if queries > M else 0), (w * M if D > M else 0)


def _keys(
    g: Any, s: Any, place: Any, walk: Walk, wg: Warpgroup, scale: float, w: jax.Array
) -> None:
    """dk, dv of the M keys of warpgroup w; on the way its part of dq, through shared memory."""
    (b, h, i), (stages, queries, D), packed = place, s.q.shape, bool(g.doc)
    start, room = i * TILE + w * M, None if wg.registers else s.room.at[w]
    mine = pl.ds(start, M)
    plgpu.copy_gmem_to_smem(g.k.at[b, mine, h], s.k.at[w], s.kv_full)
    plgpu.copy_gmem_to_smem(g.v.at[b, mine, h], s.v.at[w], s.kv_full)
    if packed:
        plgpu.copy_gmem_to_smem(g.doc[0].at[b, mine], s.doc_k.at[w], s.kv_full)
    plgpu.barrier_wait(s.kv_full)
    row, column = _dq_part(w, queries, D)

    def score(acc, slot):
        plgpu.wgmma(acc, s.k.at[w], transposed(s.q.at[slot]))

    def first(acc):
        pl.when(walk.steps() > 0)(lambda: plgpu.barrier_wait(s.q_ring["full"].at[0]))
        score(acc, 0)
        return acc[...]

    def step(t, carry):
        dk, dv, scores = carry
        slot, half, after = lax.rem(t, stages), lax.rem(t, 2), lax.rem(t + 1, stages)
        key_set, _, tile = walk.at(t)

        def same():
            across = along_columns(vector(s.doc_q.at[slot], COLUMNS), M)
            return along_rows(vector(s.doc_k.at[w]), queries) == across

        def add(dv, dk):
            def slopes(products):
                """p (do . v - delta), keys along rows; dv on the way."""
                plgpu.wgmma(products, s.v.at[w], transposed(s.do.at[slot]))
                seen = walk.mask(
                    scores, key_set, tile, tile * queries, start, same if packed else None,
                    transpose=True,
                )  # fmt: skip
                lse = along_columns(vector(s.lse.at[slot], COLUMNS), M)
                p = jnp.exp2(seen * (scale * LOG2E) - lse)
                plgpu.wgmma(dv, wg.operand(p, room), s.do.at[slot])
                delta = along_columns(vector(s.delta.at[slot], COLUMNS), M)
                return p * (wg.before_last(products) - delta)

            ds = pl.run_scoped(slopes, accumulator((M, queries)))
            s.ds[half, w] = ds.astype(bf16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.ds_full)
            plgpu.wgmma(dk, wg.operand(ds, room), s.q.at[slot])

        def finish(dq, scores):
            """dq, while the scores of the next step are made."""
            for other in range(2):
                left = transposed(s.ds.at[half, other, :, pl.ds(row, M)])
                plgpu.wgmma(dq, left, s.k.at[other, :, pl.ds(column, M)])
            more = t + 1 < walk.steps()
            pl.when(more)(lambda: plgpu.barrier_wait(s.q_ring["full"].at[after]))
            score(scores, after)  # of the last step: of a tile that nobody needs
            dq = wg.before_last(dq)
            pl.when(t > 0)(lambda: plgpu.barrier_wait(s.dq_free))
            s.dq[w] = dq
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.dq_full)
            return scores[...]

        dv, dk = wg.accumulate_both(dv, dk, add)
        plgpu.barrier_arrive(s.q_ring["free"].at[slot])
        plgpu.barrier_wait(s.ds_full)
        scores = pl.run_scoped(finish, accumulator((M, M)), accumulator((M, queries)))
        return dk, dv, scores

    scores = pl.run_scoped(first, accumulator((M, queries)))
    dk, dv, _ = lax.fori_loop(0, walk.steps(), step, (zeros(M, D), zeros(M, D), scores))
    plgpu.barrier_arrive(s.k_free)
    plgpu.barrier_wait(s.k_free)  # the other warpgroup made its dq with these keys
    s.k[w], s.v[w] = (dk * scale).astype(bf16), dv.astype(bf16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s.k.at[w], g.dk.at[b, mine, h])
    plgpu.copy_smem_to_gmem(s.v.at[w], g.dv.at[b, mine, h])
    pl.when(walk.steps() > 0)(lambda: plgpu.barrier_wait(s.dq_free))
    plgpu.wait_smem_to_gmem(0)


def _queries(g: Any, s: Any, place: Any, walk: Walk) -> None:
    """Load tiles of queries; add their dq to what the CTAs of later keys have left, in turns."""
    (b, h, i), (stages, queries, D), group = place, s.q.shape, walk.repeats
    shape = g.q.shape[0], g.q.shape[2], g.q.shape[1] // queries
    interpret = hasattr(s, "old")
    turns = None if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR(shape))

    def load(t, slot):
        _, repeat, tile = walk.at(t)
        some, head, full = pl.ds(tile * queries, queries), h * group + repeat, s.q_ring["full"]
        for source, target in ((g.q, s.q), (g.do, s.do)):
            plgpu.copy_gmem_to_smem(source.at[b, some, head], target.at[slot], full.at[slot])
        for source, target in ((g.lse, s.lse), (g.delta, s.delta)):
            plgpu.copy_gmem_to_smem(source.at[b, head, some], target.at[slot], full.at[slot])
        if g.doc:
            plgpu.copy_gmem_to_smem(g.doc[0].at[b, some], s.doc_q.at[slot], full.at[slot])

    def add(t):
        _, repeat, tile = walk.at(t)
        head = h * group + repeat
        before = g.last[0, b, tile] - i  # so many CTAs have their turn before this one
        corners = [_dq_part(w, queries, D) for w in range(2)]
        targets = [
            g.dq.at[b, pl.ds(tile * queries + row, M), head, pl.ds(column, M)]
            for row, column in corners
        ]

        def copy(**how: Any) -> None:
            for w, target in enumerate(targets):
                plgpu.copy_smem_to_gmem(s.dq.at[w], target, **how)

        def add_old():  # the interpreter, which runs one CTA after the other, has no such copies
            for w, target in enumerate(targets):
                plgpu.copy_gmem_to_smem(target, s.old.at[w], s.old_full)
            plgpu.barrier_wait(s.old_full)
            s.dq[...] += s.old[...]
            plgpu.commit_smem()

        plgpu.barrier_wait(s.dq_full)
        if interpret:
            pl.when(before > 0)(add_old)
            copy()
        else:
            turn = turns.at[b, head, tile]
            plgpu.semaphore_wait(turn, before, decrement=False, memory_scope="gpu")
            pl.when(before > 0)(lambda: copy(reduction_op="add"))
            pl.when(before == 0)(copy)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s.dq_free)
        plgpu.wait_smem_to_gmem(0)
        if not interpret:
            plgpu.semaphore_signal(turns.at[b, head, tile], memory_scope="gpu")

    def step(t, _):
        slot = lax.rem(t, stages)
        pl.when(t >= stages)(lambda: plgpu.barrier_wait(s.q_ring["free"].at[slot]))
        pl.when(t < walk.steps())(lambda: load(t, slot))
        pl.when(t >= stages)(lambda: add(t - stages))

    lax.fori_loop(0, walk.steps() + jnp.where(walk.steps() > 0, stages, 0), step, None)
