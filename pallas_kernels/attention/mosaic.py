"""Causal softmax attention on Hopper GPUs: Pallas Mosaic kernels, forward and backward.

One softmax over one or more streams, as in chunked.py: full attention, a sliding window, queries
that continue a cache and packed documents are one stream; B'MOJO-F is two, walked one after the
other with a single online softmax (FlashAttention, Dao et al. 2022).

    forward   per tile of queries:  o = sum_j p_j v_j,  p_j = exp(scale q . k_j - lse)
    dq        per tile of queries:  ds_j = p_j (do . v_j - do . o),  dq = scale sum_j ds_j k_j
    dkv       per tile of keys:     dk = scale sum_i ds_i q_i,  dv = sum_i p_i do_i

The backward pass recomputes p from the log-sum-exp of the joint softmax, so every stream has its
own kernels and no result is written twice. A CTA has two warpgroups of 64 rows that compute and one
that fills a ring of tiles in shared memory by TMA. q, k, v are read as they lie in memory
[B, T, heads, D]. Which tiles a row of tiles can see, and which of them need no mask, is known
before (`_spans`). Products have bfloat16 operands and float32 accumulators.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.chunked import Stream, document_ids, make_stream
from pallas_kernels.dispatch import why_no_hopper
from pallas_kernels.mosaic import (
    COLUMNS,
    MATRIX,
    ROWS,
    Warpgroup,
    accumulator,
    along_columns,
    along_rows,
    tile,
    transposed,
    vector,
)
from pallas_kernels.tuning import tuned

M = 64  # rows of a warpgroup
TILE = 2 * M  # rows of a CTA; lengths are padded to it
MEMORY = 2  # the warpgroup that loads; 0 and 1 compute
LOG2E = math.log2(math.e)
LOWEST = -1e30  # start of running maxima: finite, so that exp2(-inf - LOWEST) is 0
FAR = 2**30
bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
Ref = Any
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


# -- which tiles see each other -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a trace depends on.

    Attributes:
      windows: (newest, oldest) of each stream: query i sees the entries own + i - d with
        newest <= d <= oldest.
      length: T without padding.
      scale: factor of the scores.
    """

    windows: tuple[tuple[int, int], ...]
    length: int
    scale: float
    interpret: bool

    def only(self, stream: int) -> _Options:
        return dataclasses.replace(self, windows=self.windows[stream : stream + 1])


def _spans(
    options: _Options,
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
      int32 [streams, B, tiles, 4]: begin, end, full_begin, full_end. Those in begin <= tile < end
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
class _Walk:
    """The tiles that a CTA visits: those of every stream in turn, all as often as `repeats`.

    Attributes:
      spans: begin, end, full_begin, full_end of each stream.
      windows: (newest, oldest) of each stream.
      places: (own, first) of each stream.
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
        """(stream, repeat, tile) of a step; repeats only with one stream."""
        (begin, *_), *more = self.spans
        if not more:
            count = self.counts()[0]
            return jnp.int32(0), lax.div(step, count), begin + lax.rem(step, count)
        count = self.counts()[0]
        late = step >= count
        tile = jnp.where(late, more[0][0] + step - count, begin + step)
        return late.astype(i32), jnp.int32(0), tile

    def pick(self, stream: jax.Array, values: tuple[Any, ...]) -> Any:
        """values[stream]"""
        return values[0] if len(values) == 1 else jnp.where(stream == 0, *values)

    def mask(
        self,
        scores: jax.Array,
        stream: jax.Array,
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
            self.pick(stream, tuple(span[i] for span in self.spans)) for i in (2, 3)
        )
        newest, oldest = (
            self.pick(stream, tuple(jnp.int32(window[i]) for window in self.windows))
            for i in (0, 1)
        )
        own, first = (self.pick(stream, tuple(place[i] for place in self.places)) for i in (0, 1))

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


def _walk(spans: Ref, places: Ref, b: Any, i: Any, streams: Any, repeats: int = 1) -> _Walk:
    """The walk of tile i in row b, from spans [streams, B, tiles, 4] and places [streams, B, 2]."""
    number = range(len(streams))
    return _Walk(
        tuple(tuple(spans[s, b, i, n] for n in range(4)) for s in number),
        streams,
        tuple((places[s, b, 0], places[s, b, 1]) for s in number),
        repeats,
    )


# -- kernels --------------------------------------------------------------------------------------


def _kernel(
    body: Callable[..., None], *, out: Any, grid: dict[str, int], scratch: dict[str, Any],
    interpret: bool, **static: Any,
) -> Callable[..., Any]:  # fmt: skip
    """`plgpu.kernel` with three warpgroups; the body gets `static` and its `mm` (`Warpgroup`)."""
    options: Any = {"interpret": plgpu.InterpretGPUParams()}
    if not interpret:
        lane = plgpu.LoweringSemantics.Lane
        params = plgpu.CompilerParams(approx_math=True, lowering_semantics=lane)
        options = {"compiler_params": params}
    return plgpu.kernel(
        functools.partial(body, mm=Warpgroup(registers=not interpret), **static),
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=body.__name__.strip("_"),
        **options,
    )


def _ring(stages: int, loads: int) -> dict[str, Any]:
    """Barriers of a ring of slots: filled by `loads` copies, freed by both computing warpgroups."""
    return {
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }


def _roles(compute: Callable[[jax.Array], None], load: Callable[[], None]) -> None:
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


def _first(mm: Warpgroup, acc: Ref) -> jax.Array:
    """The accumulator of the first of two products, while the second one runs."""
    return plgpu.wgmma_accumulator_load(acc, wait_n=1) if mm.registers else acc[...]


def _accumulate_both(
    mm: Warpgroup, a: jax.Array, b: jax.Array, add: Callable[[Ref, Ref], None]
) -> tuple[jax.Array, jax.Array]:
    """a and b plus what `add` adds to their accumulators."""
    if mm.registers:
        start: Any = tuple(_ACC.init(plgpu.layout_cast(x, MATRIX)) for x in (a, b))
        a, b = pl.run_state(lambda accs: add(*accs))(start)
        return plgpu.layout_cast(a, MATRIX), plgpu.layout_cast(b, MATRIX)

    def run(*accs):
        add(*accs)
        return accs[0][...], accs[1][...]

    sums = pl.run_scoped(run, accumulator(a.shape), accumulator(b.shape))
    return a + sums[0], b + sums[1]


def _zeros(*shape: int) -> jax.Array:
    layout = MATRIX if len(shape) == 2 else ROWS
    return plgpu.layout_cast(jnp.full(shape, 0.0, f32), layout)


def forward(
    options: _Options,
    qs: tuple[jax.Array, ...],
    ks: tuple[jax.Array, ...],
    vs: tuple[jax.Array, ...],
    places: jax.Array,
    doc: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of the joint softmax.

    Args:
      qs: bfloat16 [B, T, H, D], one, or one for each stream; T is a multiple of TILE.
      ks, vs: bfloat16 [B, S, K, D] of one or two streams; S are multiples of TILE.
      places: int32 [streams, B, 2]: the entry of query 0 itself, the first filled entry.
      doc: int32 [B, T] or None; a query sees its own document only.

    Returns:
      o [B, T, H, D] bfloat16 and lse [B, H, T] float32 (natural; 0 and +inf where no key is seen).
    """
    q, packed = qs[0], doc is not None
    B, T, H, D = q.shape
    size = tuned("attention.forward", bf16, T, keys=TILE, stages=2)
    keys, stages = size["keys"], size["stages"]
    scratch = {
        "q_s": tile((2, len(qs), M, D)),
        "k_s": tile((stages, keys, D)),
        "v_s": tile((stages, keys, D)),
        "lse_s": plgpu.SMEM((2, M), f32),
        "q_full": plgpu.Barrier(num_arrivals=len(qs) + packed, num_barriers=2),
        "k_ring": _ring(stages, 1 + packed),
        "v_ring": _ring(stages, 1),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if packed:
        scratch |= {"doc_q": plgpu.SMEM((2, M), i32), "doc_k": plgpu.SMEM((stages, keys), i32)}
    if options.interpret:
        scratch["room"] = tile((2, M, keys))
    spans = _spans(options, q, ks, places, doc, TILE, keys)
    return _kernel(
        _attention_forward,
        out=(jax.ShapeDtypeStruct(q.shape, bf16), jax.ShapeDtypeStruct((B, H, T), f32)),
        grid={"h": H, "i": T // TILE, "b": B},
        scratch=scratch,
        interpret=options.interpret,
        queries=len(qs),
        windows=options.windows,
        scale=options.scale,
    )(*qs, *ks, *vs, spans, places, *_given(doc))


def _given(x: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if x is None else (x,)


def _attention_forward(
    *refs: Ref, queries: int, windows: Any, scale: float, mm: Warpgroup,
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
    walk = _walk(spans_g, places_g, b, i, windows)

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
            stream, _, tile = walk.at(t)
            plgpu.barrier_wait(k_ring["full"].at[slot])
            query = q_s.at[w, stream if queries > 1 else 0]

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
            s = walk.mask(s, stream, tile, start, tile * keys, same if packed else None)
            plgpu.barrier_arrive(k_ring["free"].at[slot])
            new_top = jnp.maximum(top, jnp.max(s, axis=1) * (scale * LOG2E))
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(s * (scale * LOG2E) - along_rows(new_top, keys))
            total = total * shrink + jnp.sum(p, axis=1)
            o = o * along_rows(shrink, D)
            left = mm.operand(p, None if room is None else room.at[w])
            take_turns()
            plgpu.barrier_wait(v_ring["full"].at[slot])
            o = mm.accumulate(o, lambda acc: plgpu.wgmma(acc, left, v_s.at[slot]))
            plgpu.barrier_arrive(v_ring["free"].at[slot])
            return o, new_top, total

        pl.when(w == 1)(take_turns)
        lowest = plgpu.layout_cast(jnp.full((M,), LOWEST, f32), ROWS)
        o, top, total = lax.fori_loop(0, walk.steps(), step, (_zeros(M, D), lowest, _zeros(M)))
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
        _load_keys(walk, k_gs, v_gs, doc_g, b, kv, k_s, v_s, doc_k, k_ring, v_ring)

    _roles(compute, load)


def _load_keys(
    walk: _Walk, k_gs: Any, v_gs: Any, doc_g: list[Ref], b: Any, kv: Any,
    k_s: Ref, v_s: Ref, doc_k: Ref, k_ring: dict[str, Ref], v_ring: dict[str, Ref],
) -> None:  # fmt: skip
    """Fill the rings with the keys and values of a walk."""
    stages, keys = k_s.shape[:2]

    def step(t, slot):
        stream, _, tile = walk.at(t)
        some = pl.ds(tile * keys, keys)
        for xs, ring, x_s in ((k_gs, k_ring, k_s), (v_gs, v_ring, v_s)):
            full = ring["full"].at[slot]
            pl.when(t >= stages)(lambda ring=ring: plgpu.barrier_wait(ring["free"].at[slot]))
            for number, x_g in enumerate(xs):

                def copy(x_g=x_g, x_s=x_s, full=full):
                    plgpu.copy_gmem_to_smem(x_g.at[b, some, kv], x_s.at[slot], full)

                pl.when(stream == number)(copy)
            if doc_g and x_s is k_s:
                plgpu.copy_gmem_to_smem(doc_g[0].at[b, some], doc_k.at[slot], full)

    _fill(walk.steps(), stages, step, (k_ring, v_ring))


def _fill(
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


def dq(
    options: _Options,
    q: jax.Array,
    ks: tuple[jax.Array, ...],
    vs: tuple[jax.Array, ...],
    places: jax.Array,
    doc: jax.Array | None,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> jax.Array:
    """Gradient of queries through the streams they read.

    Args: as `forward`; do like q; lse of the joint softmax and delta = do . o, float32 [B, H, T].
    """
    (B, T, H, D), packed = q.shape, doc is not None
    size = tuned("attention.dq", bf16, T, keys=TILE, stages=2)
    keys, stages = size["keys"], size["stages"]
    scratch = {
        "q_s": tile((2, M, D)),
        "do_s": tile((2, M, D)),
        "k_s": tile((stages, keys, D)),
        "v_s": tile((stages, keys, D)),
        "lse_s": plgpu.SMEM((2, M), f32),
        "delta_s": plgpu.SMEM((2, M), f32),
        "q_full": plgpu.Barrier(num_arrivals=4 + packed, num_barriers=2),
        "k_ring": _ring(stages, 1 + packed),
        "v_ring": _ring(stages, 1),
    }
    if packed:
        scratch |= {"doc_q": plgpu.SMEM((2, M), i32), "doc_k": plgpu.SMEM((stages, keys), i32)}
    if options.interpret:
        scratch["room"] = tile((2, M, keys))
    spans = _spans(options, q, ks, places, doc, TILE, keys)
    return _kernel(
        _attention_dq,
        out=jax.ShapeDtypeStruct(q.shape, bf16),
        grid={"h": H, "i": T // TILE, "b": B},
        scratch=scratch,
        interpret=options.interpret,
        windows=options.windows,
        scale=options.scale,
    )(q, *ks, *vs, do, lse, delta, spans, places, *_given(doc))


def _attention_dq(
    *refs: Ref, windows: Any, scale: float, mm: Warpgroup,
    q_s, do_s, k_s, v_s, lse_s, delta_s, q_full, k_ring, v_ring,
    doc_q: Ref = None, doc_k: Ref = None, room: Ref = None,
) -> None:  # fmt: skip
    n = len(windows)
    q_g, k_gs, v_gs = refs[0], refs[1 : 1 + n], refs[1 + n :][:n]
    do_g, lse_g, delta_g, spans_g, places_g, *doc_g, dq_g = refs[1 + 2 * n :]
    tiles, (stages, keys, D) = q_g.shape[1] // TILE, k_s.shape
    h, i, b = lax.axis_index("h"), tiles - 1 - lax.axis_index("i"), lax.axis_index("b")
    kv = h // (q_g.shape[2] // k_gs[0].shape[2])
    walk = _walk(spans_g, places_g, b, i, windows)

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
            stream, _, tile = walk.at(t)

            def same():
                down = along_rows(vector(doc_q.at[w]), keys)
                return down == along_columns(vector(doc_k.at[slot], COLUMNS), M)

            def gradient(scores, products):
                plgpu.barrier_wait(k_ring["full"].at[slot])
                plgpu.wgmma(scores, q_s.at[w], transposed(k_s.at[slot]))
                plgpu.barrier_wait(v_ring["full"].at[slot])
                plgpu.wgmma(products, do_s.at[w], transposed(v_s.at[slot]))
                s = _first(mm, scores)
                s = walk.mask(s, stream, tile, start, tile * keys, same if doc_g else None)
                p = jnp.exp2(s * (scale * LOG2E) - along_rows(lse, keys))
                return p * (products[...] - along_rows(delta, keys))

            ds = pl.run_scoped(gradient, accumulator((M, keys)), accumulator((M, keys)))
            plgpu.barrier_arrive(v_ring["free"].at[slot])
            left = mm.operand(ds, None if room is None else room.at[w])
            dq = mm.accumulate(dq, lambda acc: plgpu.wgmma(acc, left, k_s.at[slot]))
            plgpu.barrier_arrive(k_ring["free"].at[slot])
            return dq

        q_s[w] = (lax.fori_loop(0, walk.steps(), step, _zeros(M, D)) * scale).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[w], dq_g.at[b, mine, h])
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        _load_keys(walk, k_gs, v_gs, doc_g, b, kv, k_s, v_s, doc_k, k_ring, v_ring)

    _roles(compute, load)


def dkv(
    options: _Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: jax.Array,
    doc: jax.Array | None,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the keys and values of one stream; arguments as those of `dq`."""
    (B, T, _, D), packed = q.shape, doc is not None
    size = tuned("attention.dkv", bf16, T, queries=M, stages=4)
    queries, stages = size["queries"], size["stages"]
    scratch = {
        "k_s": tile((2, M, D)),
        "v_s": tile((2, M, D)),
        "q_s": tile((stages, queries, D)),
        "do_s": tile((stages, queries, D)),
        "lse_s": plgpu.SMEM((stages, queries), f32),
        "delta_s": plgpu.SMEM((stages, queries), f32),
        "k_full": plgpu.Barrier(num_arrivals=2 + packed, num_barriers=2),
        "q_ring": _ring(stages, 2 + packed),
        "do_ring": _ring(stages, 2),
    }
    if packed:
        scratch |= {"doc_k": plgpu.SMEM((2, M), i32), "doc_q": plgpu.SMEM((stages, queries), i32)}
    if options.interpret:
        scratch["room"] = tile((2, M, queries))
    spans = _spans(options, q, (k,), places, doc, queries, TILE, by_key=True)
    return _kernel(
        _attention_dkv,
        out=(jax.ShapeDtypeStruct(k.shape, bf16), jax.ShapeDtypeStruct(v.shape, bf16)),
        grid={"h": k.shape[2], "i": k.shape[1] // TILE, "b": B},
        scratch=scratch,
        interpret=options.interpret,
        windows=options.windows,
        scale=options.scale,
    )(q, k, v, do, lse, delta, spans, places, *_given(doc))


def _attention_dkv(
    q_g, k_g, v_g, do_g, lse_g, delta_g, spans_g, places_g, *rest: Ref,
    windows: Any, scale: float, mm: Warpgroup,
    k_s, v_s, q_s, do_s, lse_s, delta_s, k_full, q_ring, do_ring,
    doc_q: Ref = None, doc_k: Ref = None, room: Ref = None,
) -> None:  # fmt: skip
    *doc_g, dk_g, dv_g = rest
    stages, queries, D = q_s.shape
    h, i, b = lax.axis_index("h"), lax.axis_index("i"), lax.axis_index("b")
    group = q_g.shape[2] // k_g.shape[2]
    walk = _walk(spans_g, places_g, b, i, windows, repeats=group)

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
            stream, _, tile = walk.at(t)

            def same():
                across = along_columns(vector(doc_q.at[slot], COLUMNS), M)
                return along_rows(vector(doc_k.at[w]), queries) == across

            def gradients(scores, products):
                """p and do . v - delta, keys along rows."""
                plgpu.barrier_wait(q_ring["full"].at[slot])
                plgpu.wgmma(scores, k_s.at[w], transposed(q_s.at[slot]))
                plgpu.barrier_wait(do_ring["full"].at[slot])
                plgpu.wgmma(products, v_s.at[w], transposed(do_s.at[slot]))
                s = _first(mm, scores)
                s = walk.mask(
                    s, stream, tile, tile * queries, start, same if doc_g else None, transpose=True
                )
                lse = along_columns(vector(lse_s.at[slot], COLUMNS) * LOG2E, M)
                p = jnp.exp2(s * (scale * LOG2E) - lse)
                delta = along_columns(vector(delta_s.at[slot], COLUMNS), M)
                return p, products[...] - delta

            p, slope = pl.run_scoped(
                gradients, accumulator((M, queries)), accumulator((M, queries))
            )

            def add(dv, dk):  # dv runs while the operand of dk is made
                plgpu.wgmma(dv, mm.operand(p, place), do_s.at[slot])
                plgpu.wgmma(dk, mm.operand(p * slope, place), q_s.at[slot])

            dv, dk = _accumulate_both(mm, dv, dk, add)
            plgpu.barrier_arrive(do_ring["free"].at[slot])
            plgpu.barrier_arrive(q_ring["free"].at[slot])
            return dk, dv

        dk, dv = lax.fori_loop(0, walk.steps(), step, (_zeros(M, D), _zeros(M, D)))
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

        _fill(walk.steps(), stages, step, (q_ring, do_ring))

    _roles(compute, load)


# -- the operators --------------------------------------------------------------------------------


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array | None,
    segment_ids: jax.Array | None,
    kv_lengths: jax.Array | None,
    *,
    window: int | None,
    past: int | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """The `attention` facade on Hopper; same arguments and result.

    Raises:
      ValueError: not bfloat16, a head_dim other than 64 and 128, a scale that is not positive.
    """
    doc = document_ids(segment_ids, kv_lengths, q.shape[1])
    oldest = None if window is None else window - 1
    stream = make_stream(q, k, v, oldest=oldest, offset=offset, past=past, doc=doc)
    return joint_attention((stream,), scale, interpret=interpret)


def two_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_fading: jax.Array,
    v_fading: jax.Array,
    q_fading: jax.Array | None,
    offset: jax.Array | None,
    segment_ids: jax.Array | None,
    kv_lengths: jax.Array | None,
    *,
    window: int,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """The `two_window_attention` facade on Hopper; same arguments and result; raises as above."""
    length = q.shape[1]
    doc = document_ids(segment_ids, kv_lengths, length)

    def stream(q: jax.Array, k: jax.Array, v: jax.Array, newest: int) -> Stream:
        past = None if offset is None else k.shape[1] - length
        oldest = newest + window - 1
        return make_stream(q, k, v, newest=newest, oldest=oldest, offset=offset, past=past, doc=doc)

    fading = stream(q if q_fading is None else q_fading, k_fading, v_fading, window)
    return joint_attention((fading, stream(q, k, v, 0)), scale, interpret=interpret)


def why_not(*arrays: jax.Array | None) -> str | None:
    """Why the kernels cannot run these queries, keys and values here; None if they can."""
    return why_no_hopper() or _unsupported(*arrays)


def _unsupported(*arrays: jax.Array | None) -> str | None:
    given = [x for x in arrays if x is not None]
    if given[0].shape[-1] not in (64, 128):
        return f"its kernels take head_dim 64 and 128, got {given[0].shape[-1]}"
    if any(jnp.dtype(x.dtype) != bf16 for x in given):
        return f"its kernels take bfloat16, got {', '.join(str(x.dtype) for x in given)}"
    return None


def joint_attention(
    streams: tuple[Stream, ...], scale: float, *, interpret: bool = False
) -> jax.Array:
    """Softmax over the union of what each query sees in one or two streams, as in chunked.py.

    Streams that hold the same array of queries share its loads and its gradient.
    """
    for s in streams:
        if reason := _unsupported(s.q, s.k, s.v):
            raise ValueError(f"attention, impl 'mosaic': {reason}.")
    if scale <= 0:
        raise ValueError(f"attention, impl 'mosaic': scale must be positive, got {scale}.")
    length, doc = streams[0].q.shape[1], streams[0].doc

    def whole(x: jax.Array, filled: jax.Array | None) -> jax.Array:
        """x with zeros where nothing may be read, and up to a multiple of the tile."""
        if filled is not None:
            x = jnp.where(filled[:, :, None, None], x, 0)
        rest = -x.shape[1] % TILE
        return jnp.pad(x, [(0, 0), (0, rest), (0, 0), (0, 0)]) if rest else x

    real = None if doc is None else doc != 0
    qs = [streams[0].q]
    if any(s.q is not qs[0] for s in streams[1:]):
        qs = [s.q for s in streams]
    ks, vs = [], []
    for s in streams:
        filled = real
        if s.k.shape[1] != length:  # a cache: whatever lies in its empty entries
            entry = jnp.arange(s.k.shape[1])
            filled = (entry >= s.first[:, None]) & (entry <= s.last[:, None])
        ks.append(whole(s.k, filled))
        vs.append(whole(s.v, filled))
    if doc is not None:
        doc = jnp.pad(doc.astype(i32), [(0, 0), (0, -length % TILE)])
    options = _Options(
        tuple((s.newest, FAR if s.oldest is None else s.oldest) for s in streams),
        length,
        scale,
        interpret,
    )
    places = jnp.stack([jnp.stack([s.own, s.first], -1) for s in streams]).astype(i32)
    o = _attend(options, tuple(whole(q, real) for q in qs), tuple(ks), tuple(vs), places, doc)
    o = o[:, :length]
    return o if real is None else jnp.where(real[:, :, None, None], o, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, qs, ks, vs, places, doc):
    return forward(options, qs, ks, vs, places, doc)[0]


def _attend_fwd(options, qs, ks, vs, places, doc):
    o, lse = forward(options, qs, ks, vs, places, doc)
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
