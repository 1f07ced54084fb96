"""Grouped product on Hopper GPUs: Pallas Mosaic kernels, forward and backward.

    y_m   = x_m W_g            W of the group g of row m       (`products`)
    dx_m  = dy_m W_g^T         the same, W read transposed
    dW_g  = sum_m x_m^T dy_m   over the rows m of g            (`outer_products`)

A CTA makes a tile of consecutive rows by some columns: it reads rows of the groups before and
behind its own, too, and writes none of them. One warpgroup fills a ring of tiles in shared memory
by TMA, one or two compute. Which rows a tile has is known before (tiles.py), so that groups that
have none, which are most of them when few tokens decode, cost nothing: their matrices are not read.
Then tiles are low, too: a product takes 64 rows, but only those of the tile are loaded. Products
have bfloat16 operands and float32 accumulators.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.compat import multiprocessors, store_rows
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.pallas_kernels.mosaic import (
    MATRIX,
    ROWS,
    Warpgroup,
    accumulator,
    along_rows,
    kernel,
    tile,
    transposed,
)
from hmf_jax.pallas_kernels.ops.grouped_matmul.tiles import ALIGN, tiles_of

M = 64  # rows of a warpgroup's product
DEPTH = 64  # of a step's product
bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
Ref = Any


def why_not(x: jax.Array, w: jax.Array) -> str | None:
    """Why the kernels cannot run these arguments on this machine; None if they can."""
    return why_no_hopper() or _unsupported(x, w)


def _unsupported(x: jax.Array, w: jax.Array) -> str | None:
    if x.dtype != bf16 or w.dtype != bf16:
        return f"its kernels take bfloat16, got {x.dtype} and {w.dtype}"
    if w.shape[1] % M or w.shape[2] % M:
        return f"its kernels take matrices whose sides {M} divides, got {w.shape[1:]}"
    return None


def grouped_matmul_mosaic(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul`.

    Raises:
      ValueError: not bfloat16, or sides of matrices that 64 does not divide.
    """
    if reason := _unsupported(x, w):
        raise ValueError(f"grouped_matmul, impl 'mosaic': {reason}.")
    return _dot(interpret, x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(interpret: bool, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return products(x, w, sizes, interpret=interpret)


def _forward(interpret, x, w, sizes):
    return products(x, w, sizes, interpret=interpret), (x, w, sizes)


def _backward(interpret, saved, dy):
    x, w, sizes = saved
    dx = products(dy, w, sizes, transpose=True, interpret=interpret)
    return dx, outer_products(x, dy, sizes, interpret=interpret), None


_dot.defvjp(_forward, _backward)


class Shape(NamedTuple):
    """Of the tile of a CTA.

    Attributes:
      height: rows; 2 M: two warpgroups compute, one below the other.
      width: columns of a warpgroup.
      wide: warpgroups beside each other.
      stages: steps whose loads are in flight.
    """

    height: int
    width: int
    wide: int
    stages: int


def shape_of(rows: int, groups: int, N: int) -> Shape:
    """The shape that wastes least: an average group shares its last tile with others, and a small
    tile leaves room for other CTAs on the multiprocessor."""
    for low in (16, 32):
        if low * groups >= 2 * rows + ALIGN * groups:
            return Shape(low, 2 * M if rows > groups and N % (2 * M) == 0 else M, 1, 4)
    if rows < 64 * groups:
        return Shape(M, 2 * M, 2, 4) if N % (4 * M) == 0 else Shape(M, M, 1, 4)
    return Shape(2 * M, widest(N), 1, 3)


def widest(columns: int) -> int:
    return next(n for n in (4 * M, 2 * M, M) if columns % n == 0)


def products(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    transpose: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """x [rows, K] times the matrix of each row's group, [G, K, N] or, `transpose`, [G, N, K]."""
    rows, N = x.shape[0], w.shape[1] if transpose else w.shape[2]
    height, width, wide, stages = shape_of(rows, len(w), N)
    tall = max(1, height // M)
    tiles = jnp.stack(tiles_of(sizes, rows, height))
    items = tiles.shape[1] * (N // (wide * width))
    scratch = {
        "x_s": tile((stages, tall, M, DEPTH)),
        "w_s": tile((stages, wide, *((width, DEPTH) if transpose else (DEPTH, width)))),
        "rest_s": plgpu.SMEM((tall * wide, M, M), bf16),
        "slots": ring(stages, tall + wide, tall * wide),
    }
    if height >= M:
        scratch["y_s"] = tile((tall * wide, 2, M, M))
    return kernel(
        _grouped_products,
        out=jax.ShapeDtypeStruct((rows + -rows % ALIGN, N), bf16),
        # Small tiles: a CTA for each, several on a multiprocessor.
        grid={"i": items if height < M else min(items, multiprocessors())},
        scratch=scratch,
        interpret=interpret,
        warpgroups=tall * wide + 1,
        items=items,
        height=height,
        width=width,
        transpose=transpose,
    )(_aligned(x, interpret), w, tiles)[:rows]


def _aligned(x: jax.Array, interpret: bool) -> jax.Array:
    """x with whole groups of 8 rows, as the copy engine wants; the interpreter, unlike that, reads
    nothing past the end."""
    rest = -len(x) % ALIGN + (2 * M if interpret else 0)
    return jnp.pad(x, [(0, rest), (0, 0)]) if rest else x


def _grouped_products(
    x_g: Ref, w_g: Ref, tiles_g: Ref, y_g: Ref, *,
    items: int, height: int, width: int, transpose: bool, wg: Warpgroup,
    x_s: Ref, w_s: Ref, rest_s: Ref, slots: Any, y_s: Ref = None,
) -> None:  # fmt: skip
    (stages, tall), wide = x_s.shape[:2], w_s.shape[1]
    across, low = y_g.shape[1] // (wide * width), min(height, M)
    depth = w_g.shape[2 if transpose else 1]

    def item(i):
        number, column = lax.div(i, across), lax.rem(i, across) * (wide * width)
        group, begin, skip, rows = (tiles_g[n, number] for n in range(4))
        steps = jnp.where((rows > 0) & (group < w_g.shape[0]), depth // DEPTH, 0)
        return steps, column, group, begin, skip, rows

    def compute(w: jax.Array) -> None:
        down, right = (w if tall > 1 else 0), (w if wide > 1 else 0)

        def run(i, done):
            steps, column, _, begin, skip, rows = item(i)

            def product(k, slot, acc):
                w_slot = w_s.at[slot, right]
                plgpu.wgmma(acc, x_s.at[slot, down], transposed(w_slot) if transpose else w_slot)

            y = accumulate(slots, stages, done, steps, (M, width), product)
            first, last = (jnp.clip(n - down * M, 0, M) for n in (skip, skip + rows))
            for c in range(0, width, M):
                part, place = y[:, c : c + M].astype(bf16), column + right * width + c
                if y_s is not None:
                    target = y_g.at[pl.ds(begin + down * M, M), pl.ds(place, M)]
                    buffer = y_s.at[w, c // M % 2]
                    pl.when(last - first == M)(lambda p=part, b=buffer, t=target: copy(p, b, t))
                some = pl.when((last > first) & ((last - first < M) | (y_s is None)))
                some(
                    lambda part=part, place=place: copy_rows(
                        part, rest_s.at[w], first, last - first, low,
                        y_g, (begin + down * M + first, place),
                    )
                )  # fmt: skip
            return steps

        each(items, run)
        plgpu.wait_smem_to_gmem(0)

    def load() -> None:
        def run(i, done):
            steps, column, group, begin, _, _ = item(i)

            def step(k, slot):
                full, deep = slots["full"].at[slot], pl.ds(k * DEPTH, DEPTH)
                for n in range(wide):
                    some = pl.ds(column + n * width, width)
                    own = w_g.at[group, some, deep] if transpose else w_g.at[group, deep, some]
                    plgpu.copy_gmem_to_smem(own, w_s.at[slot, n], full)
                for n in range(tall):
                    part = x_g.at[pl.ds(pl.multiple_of(begin + n * M, ALIGN), low), deep]
                    plgpu.copy_gmem_to_smem(part, x_s.at[slot, n, pl.ds(0, low)], full)

            fill(slots, stages, done, steps, step)
            return steps

        drain(slots, stages, each(items, run))

    roles(tall * wide, compute, load)


def ring(stages: int, loads: int, computing: int) -> dict[str, Any]:
    """Barriers of a ring of slots: filled by `loads` copies, freed by all computing warpgroups."""
    return {
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    }


def roles(computing: int, compute: Any, load: Any) -> None:
    """The first `computing` warpgroups compute, the last one loads."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < computing)
    def run_compute():
        if computing > 1:
            plgpu.set_max_registers(240, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == computing)
    def run_load():
        if computing > 1:
            plgpu.set_max_registers(24, action="decrease")
        load()


def each(items: int, run: Any) -> jax.Array:
    """steps = run(item, steps before it) for all items of this CTA; the sum of their steps.

    The ring goes on from one item to the next: while one is written, the next is loaded.
    """
    first, stride = lax.axis_index("i"), lax.axis_size("i")
    count = lax.div(items - first + stride - 1, jnp.int32(stride))
    return lax.fori_loop(
        0, count, lambda n, done: done + run(first + n * stride, done), jnp.int32(0)
    )


def fill(slots: Any, stages: int, done: Any, steps: Any, step: Any) -> None:
    """Run step(k, slot) for all steps, each when its slot is free."""

    def fill_slot(k, _):
        slot = lax.rem(done + k, stages)
        pl.when(done + k >= stages)(lambda: plgpu.barrier_wait(slots["free"].at[slot]))
        step(k, slot)

    lax.fori_loop(0, steps, fill_slot, None)


def drain(slots: Any, stages: int, steps: Any) -> None:
    """Wait until the slots of the last steps are free."""

    def wait(k, _):
        plgpu.barrier_wait(slots["free"].at[lax.rem(k, stages)])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def accumulate(
    slots: Any, stages: int, done: Any, steps: Any, shape: tuple[int, int], product: Any
) -> jax.Array:
    """The sum of product(k, slot, acc) over all steps; frees a slot when its product is done."""

    def slot(k):
        return lax.rem(done + k, stages)

    def free(k):
        pl.when(k >= 0)(lambda: plgpu.barrier_arrive(slots["free"].at[slot(k)]))

    def run(acc):
        def step(k, _):
            plgpu.barrier_wait(slots["full"].at[slot(k)])
            product(k, slot(k), acc)
            plgpu.wgmma_wait(1)  # for the product before this one
            free(k - 1)

        lax.fori_loop(0, steps, step, None)
        total = acc[...]
        free(steps - 1)
        return total

    return pl.run_scoped(run, accumulator(shape))


def copy(y: jax.Array, buffer: Ref, target: Ref) -> None:
    """Copy y out through the buffer, one of two in turn."""
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    buffer[...] = y
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)


def copy_rows(
    y: jax.Array, buffer: Ref, first: Any, rows: Any, most: int, y_g: Ref, place: Any
) -> None:
    """Copy `rows` rows of y from `first` on, at most `most`, a power of two, to the (row, column)
    `place` of y_g. A copy has a fixed number of rows: there is one for every bit."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    store_rows(buffer, y)
    plgpu.commit_smem()
    size, at = most, 0
    while size:
        part = rows & size

        def copy_some(size=size, at=at):
            target = y_g.at[pl.ds(place[0] + at, size), pl.ds(place[1], y.shape[1])]
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(first + at, size)], target)

        pl.when(part != 0)(copy_some)
        at, size = at + part, size // 2


def outer_products(
    x: jax.Array, dy: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """x^T dy over the rows of every group: x [rows, K], dy [rows, N] -> [G, K, N]."""
    K, N, G = x.shape[1], dy.shape[1], len(sizes)
    tall, width, stages = (2 if K % (2 * M) == 0 else 1), widest(N), 3
    ends = jnp.cumsum(sizes)
    items = G * (K // (tall * M)) * (N // width)
    return kernel(
        _grouped_outer_products,
        out=jax.ShapeDtypeStruct((G, K, N), bf16),
        grid={"i": min(items, multiprocessors())},
        scratch={
            "x_s": tile((stages, tall, DEPTH, M)),
            "dy_s": tile((stages, DEPTH, width)),
            "dw_s": tile((tall, 2, M, M)),
            "slots": ring(stages, 1 + tall, tall),
        },
        interpret=interpret,
        warpgroups=tall + 1,
        items=items,
    )(_aligned(x, interpret), _aligned(dy, interpret), jnp.stack([ends - sizes, ends]))


def _grouped_outer_products(
    x_g: Ref, dy_g: Ref, places_g: Ref, dw_g: Ref, *,
    items: int, wg: Warpgroup, x_s: Ref, dy_s: Ref, dw_s: Ref, slots: Any,
) -> None:  # fmt: skip
    (stages, tall), width = x_s.shape[:2], dy_s.shape[2]
    down, across = dw_g.shape[1] // (tall * M), dw_g.shape[2] // width

    def item(i):
        group, rest = lax.div(i, down * across), lax.rem(i, down * across)
        top, column = lax.div(rest, across) * (tall * M), lax.rem(rest, across) * width
        start, end = (places_g[n, group] for n in range(2))
        begin = lax.div(start, ALIGN) * ALIGN
        steps = jnp.where(end > start, lax.div(end - begin + DEPTH - 1, DEPTH), 0)
        return steps, group, top, column, begin, start, end

    def compute(w: jax.Array) -> None:
        def run(i, done):
            steps, group, top, column, begin, start, end = item(i)

            def product(k, slot, acc):
                left, right = x_s.at[slot, w], dy_s.at[slot]
                first, last = start - begin - k * DEPTH, end - begin - k * DEPTH

                @pl.when((first > 0) | (last < DEPTH))
                def blank_both():  # both warpgroups write the same values into `right`
                    blank(left, first, last)
                    for c in range(0, width, M):
                        blank(right.at[:, pl.ds(c, M)], first, last)
                    plgpu.commit_smem()

                plgpu.wgmma(acc, transposed(left), right)

            dw = accumulate(slots, stages, done, steps, (M, width), product)
            for c in range(0, width, M):
                target = dw_g.at[group, pl.ds(top + w * M, M), pl.ds(column + c, M)]
                copy(dw[:, c : c + M].astype(bf16), dw_s.at[w, c // M % 2], target)
            return steps

        each(items, run)
        plgpu.wait_smem_to_gmem(0)

    def blank(x: Ref, first: jax.Array, last: jax.Array) -> None:
        """Zeros in all rows but those from `first` to `last`: they are of other groups."""
        row = along_rows(plgpu.broadcasted_iota(i32, x.shape[:1], 0, layout=ROWS), x.shape[1])
        mine = (row >= first) & (row < last)
        x[...] = jnp.where(mine, plgpu.load(x, layout=MATRIX), jnp.bfloat16(0))

    def load() -> None:
        def run(i, done):
            steps, _, top, column, begin, _, _ = item(i)

            def step(k, slot):
                full = slots["full"].at[slot]
                deep = pl.ds(pl.multiple_of(begin + k * DEPTH, ALIGN), DEPTH)
                plgpu.copy_gmem_to_smem(dy_g.at[deep, pl.ds(column, width)], dy_s.at[slot], full)
                for n in range(tall):
                    part = x_g.at[deep, pl.ds(top + n * M, M)]
                    plgpu.copy_gmem_to_smem(part, x_s.at[slot, n], full)

            fill(slots, stages, done, steps, step)
            return steps

        drain(slots, stages, each(items, run))

    roles(tall, compute, load)
