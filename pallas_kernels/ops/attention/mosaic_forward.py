"""Forward kernel of attention on Hopper, and what the backward ones share: see mosaic.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.mosaic import (
    COLUMNS,
    MATRIX,
    ROWS,
    Warpgroup,
    accumulator,
    along_columns,
    along_rows,
    kernel,
    tile,
    transposed,
    vector,
)
from hmf_jax.pallas_kernels.ops.attention.mosaic_tiles import (
    LOG2E,
    LOWEST,
    MEMORY,
    TILE,
    M,
    Options,
    Ref,
    Walk,
    bf16,
    f32,
    i32,
    spans_of,
    walk_of,
)


def ring(stages: int, loads: int) -> dict[str, Any]:
    """Barriers of a ring of slots: filled by `loads` copies, freed by both computing warpgroups."""
    return {
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }


def roles(compute: Callable[[jax.Array], None], load: Callable[[], None]) -> None:
    """Two warpgroups compute, one loads."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < MEMORY)
    def computing():
        plgpu.set_max_registers(240, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == MEMORY)
    def loading():
        plgpu.set_max_registers(24, action="decrease")
        load()


def zeros(*shape: int) -> jax.Array:
    layout = MATRIX if len(shape) == 2 else ROWS
    return plgpu.layout_cast(jnp.full(shape, 0.0, f32), layout)


def forward(
    options: Options,
    qs: tuple[jax.Array, ...],
    ks: tuple[jax.Array, ...],
    vs: tuple[jax.Array, ...],
    places: jax.Array,
    doc: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of the joint softmax.

    Args:
      qs: bfloat16 [B, T, H, D], one, or one for each key set; T is a multiple of TILE.
      ks, vs: bfloat16 [B, S, K, D] of one or two key sets; S are multiples of TILE.
      places: int32 [key_sets, B, 2]: the entry of query 0 itself, the first filled entry.
      doc: int32 [B, T] or None; a query sees its own document only.

    Returns:
      o [B, T, H, D] bfloat16 and lse [B, H, T] float32 (natural; 0 and +inf where no key is seen).
    """
    q, packed = qs[0], doc is not None
    B, T, H, D = q.shape
    keys, stages = TILE, 2  # of a tile, and tiles whose loads are in flight
    scratch = {
        "q_s": tile((2, len(qs), M, D)),
        "k_s": tile((stages, keys, D)),
        "v_s": tile((stages, keys, D)),
        "lse_s": plgpu.SMEM((2, M), f32),
        "q_full": plgpu.Barrier(num_arrivals=len(qs) + packed, num_barriers=2),
        "k_ring": ring(stages, 1 + packed),
        "v_ring": ring(stages, 1),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if packed:
        scratch |= {"doc_q": plgpu.SMEM((2, M), i32), "doc_k": plgpu.SMEM((stages, keys), i32)}
    if options.interpret:
        scratch["room"] = tile((2, M, keys))
    spans = spans_of(options, q, ks, places, doc, TILE, keys)
    return kernel(
        _attention_forward,
        out=(jax.ShapeDtypeStruct(q.shape, bf16), jax.ShapeDtypeStruct((B, H, T), f32)),
        grid={"h": H, "i": T // TILE, "b": B},
        scratch=scratch,
        interpret=options.interpret,
        warpgroups=3,
        queries=len(qs),
        windows=options.windows,
        scale=options.scale,
    )(*qs, *ks, *vs, spans, places, *given(doc))


def given(x: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if x is None else (x,)


def _attention_forward(
    *refs: Ref, queries: int, windows: Any, scale: float, wg: Warpgroup,
    q_s, k_s, v_s, lse_s, q_full, k_ring, v_ring, turn,
    doc_q: Ref = None, doc_k: Ref = None, room: Ref = None,
) -> None:  # fmt: skip
    n = len(windows)
    q_gs, k_gs, v_gs = refs[:queries], refs[queries:][:n], refs[queries + n :][:n]
    spans_g, places_g, *doc_g, o_g, lse_g = refs[queries + 2 * n :]
    packed = bool(doc_g)
    tiles, (stages, keys, D) = q_gs[0].shape[1] // TILE, k_s.shape
    # Last tiles first: with an unlimited window they have the most keys.
    h, i, b = lax.axis_index("h"), tiles - 1 - lax.axis_index("i"), lax.axis_index("b")
    kv = h // (q_gs[0].shape[2] // k_gs[0].shape[2])
    walk = walk_of(spans_g, places_g, b, i, windows)

    def compute(w: jax.Array) -> None:
        start = i * TILE + w * M
        mine = pl.ds(start, M)
        for number, q_g in enumerate(q_gs):
            plgpu.copy_gmem_to_smem(q_g.at[b, mine, h], q_s.at[w, number], q_full.at[w])
        if packed:
            plgpu.copy_gmem_to_smem(doc_g[0].at[b, mine], doc_q.at[w], q_full.at[w])
        plgpu.barrier_wait(q_full.at[w])

        def take_turns():
            # One warpgroup has the tensor cores while the other has its softmax.
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(t, carry):
            o, top, total = carry
            slot = lax.rem(t, stages)
            key_set, _, tile = walk.at(t)
            plgpu.barrier_wait(k_ring["full"].at[slot])
            query = q_s.at[w, key_set if queries > 1 else 0]

            def product(acc):
                # The queries stay in shared memory: as a register operand they were overwritten
                # before wgmma had read them (a fault of ptxas before CUDA 13.3).
                plgpu.wgmma(acc, query, transposed(k_s.at[slot]))
                take_turns()
                return acc[...]

            def same():
                down = along_rows(vector(doc_q.at[w]), keys)
                return down == along_columns(vector(doc_k.at[slot], COLUMNS), M)

            s = pl.run_scoped(product, accumulator((M, keys)))
            s = walk.mask(s, key_set, tile, start, tile * keys, same if packed else None)
            plgpu.barrier_arrive(k_ring["free"].at[slot])
            new_top = jnp.maximum(top, jnp.max(s, axis=1) * (scale * LOG2E))
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(s * (scale * LOG2E) - along_rows(new_top, keys))
            total = total * shrink + jnp.sum(p, axis=1)
            o = o * along_rows(shrink, D)
            left = wg.operand(p, None if room is None else room.at[w])
            take_turns()
            plgpu.barrier_wait(v_ring["full"].at[slot])
            o = wg.accumulate(o, lambda acc: plgpu.wgmma(acc, left, v_s.at[slot]))
            plgpu.barrier_arrive(v_ring["free"].at[slot])
            return o, new_top, total

        pl.when(w == 1)(take_turns)
        lowest = plgpu.layout_cast(jnp.full((M,), LOWEST, f32), ROWS)
        o, top, total = lax.fori_loop(0, walk.steps(), step, (zeros(M, D), lowest, zeros(M)))
        pl.when(w == 0)(take_turns)
        seen = total > 0.0
        total = jnp.where(seen, total, 1.0)
        q_s[w, 0] = (o * along_rows(1.0 / total, D)).astype(bf16)
        lse_s[w] = jnp.where(seen, top * (1 / LOG2E) + jnp.log(total), jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[w, 0], o_g.at[b, mine, h])
        plgpu.copy_smem_to_gmem(lse_s.at[w], lse_g.at[b, h, mine])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        load_keys(walk, k_gs, v_gs, doc_g, b, kv, k_s, v_s, doc_k, k_ring, v_ring)

    roles(compute, load)


def load_keys(
    walk: Walk, k_gs: Any, v_gs: Any, doc_g: list[Ref], b: Any, kv: Any,
    k_s: Ref, v_s: Ref, doc_k: Ref, k_ring: dict[str, Ref], v_ring: dict[str, Ref],
) -> None:  # fmt: skip
    """Fill the rings with the keys and values of a walk."""
    stages, keys = k_s.shape[:2]

    def step(t, slot):
        key_set, _, tile = walk.at(t)
        some = pl.ds(tile * keys, keys)
        for xs, slots, x_s in ((k_gs, k_ring, k_s), (v_gs, v_ring, v_s)):
            full = slots["full"].at[slot]
            pl.when(t >= stages)(lambda slots=slots: plgpu.barrier_wait(slots["free"].at[slot]))
            for number, x_g in enumerate(xs):

                def copy(x_g=x_g, x_s=x_s, full=full):
                    plgpu.copy_gmem_to_smem(x_g.at[b, some, kv], x_s.at[slot], full)

                pl.when(key_set == number)(copy)
            if doc_g and x_s is k_s:
                plgpu.copy_gmem_to_smem(doc_g[0].at[b, some], doc_k.at[slot], full)

    fill(walk.steps(), stages, step, (k_ring, v_ring))


def fill(
    steps: jax.Array,
    stages: int,
    step: Callable[[jax.Array, jax.Array], None],
    rings: tuple[dict[str, Ref], ...],
) -> None:
    """Run step(t, slot) for all steps, then wait until every slot is free again."""

    def drain(t, _):
        for ring in rings:
            plgpu.barrier_wait(ring["free"].at[lax.rem(t, stages)])

    lax.fori_loop(0, steps, lambda t, _: step(t, lax.rem(t, stages)), None)
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)
