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

from hmf_jax.pallas_kernels.compat import store_rows
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


def ring(stages: int, loads: int, computing: int) -> dict[str, Any]:
    """Barriers of a ring of slots: filled by `loads` copies, freed by all computing warpgroups."""
    return {
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    }


class Shape(NamedTuple):
    """Of the tiles of one CTA.

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


def _shape(rows: int, groups: int, N: int) -> Shape:
    """The shape that wastes least: an average group shares its last tile with others, and a low
    tile leaves more of a multiprocessor to other CTAs."""
    if (low := next((h for h in (16, 32) if h * groups >= 2 * rows + ALIGN * groups), 0)) != 0:
        return Shape(low, M, 1, 4)
    if rows < 256 * groups and N % (2 * M) == 0:
        return Shape(M, 2 * M if N % (4 * M) == 0 else M, 2, 4)
    return Shape(2 * M, next(n for n in (4 * M, 2 * M, M) if N % n == 0), 1, 3)


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
    height, width, wide, stages = _shape(rows, len(w), N)
    tall = max(1, height // M)
    tiles = jnp.stack(tiles_of(sizes, rows, height))
    return kernel(
        _grouped_products,
        out=jax.ShapeDtypeStruct((rows, N), bf16),
        grid={"i": tiles.shape[1] * (N // (wide * width))},
        scratch={
            "x_s": tile((stages, tall, M, DEPTH)),
            "w_s": tile((stages, wide, *((width, DEPTH) if transpose else (DEPTH, width)))),
            "y_s": plgpu.SMEM((tall * wide, M, width), bf16),
            "slots": ring(stages, tall + wide, tall * wide),
        },
        interpret=interpret,
        warpgroups=tall * wide + 1,
        height=height,
        transpose=transpose,
    )(_aligned(x, interpret), w, tiles)


def _aligned(x: jax.Array, interpret: bool) -> jax.Array:
    """x with whole groups of 8 rows, as the copy engine wants; the interpreter, unlike that, reads
    nothing past the end."""
    rest = -len(x) % ALIGN + (2 * M if interpret else 0)
    return jnp.pad(x, [(0, rest), (0, 0)]) if rest else x


def _grouped_products(
    x_g: Ref, w_g: Ref, tiles_g: Ref, y_g: Ref, *,
    height: int, transpose: bool, wg: Warpgroup, x_s: Ref, w_s: Ref, y_s: Ref, slots: Any,
) -> None:  # fmt: skip
    (stages, tall), wide, width = x_s.shape[:2], w_s.shape[1], y_s.shape[-1]
    across = y_g.shape[1] // (wide * width)
    i = lax.axis_index("i")
    number, column = lax.div(i, across), lax.rem(i, across) * (wide * width)
    group, begin, skip, rows = (tiles_g[n, number] for n in range(4))
    steps = jnp.where((rows > 0) & (group < w_g.shape[0]), w_g.shape[2 if transpose else 1], 0)
    steps = lax.div(steps, DEPTH)
    low = min(height, M)

    def compute(w: jax.Array) -> None:
        down, right = (w if tall > 1 else 0), (w if wide > 1 else 0)

        def product(k, slot, acc):
            w_slot = w_s.at[slot, right]
            plgpu.wgmma(acc, x_s.at[slot, down], transposed(w_slot) if transpose else w_slot)

        y = accumulate(steps, slots, (M, width), product)
        store_rows(y_s.at[w], y.astype(bf16))
        plgpu.commit_smem()
        first, last = (jnp.clip(n - down * M, 0, M) for n in (skip, skip + rows))
        place = begin + down * M + first, column + right * width
        copy_rows(y_s.at[w], first, last - first, low, y_g, place)

    def load() -> None:
        def step(k, slot):
            full, deep = slots["full"].at[slot], pl.ds(k * DEPTH, DEPTH)
            for n in range(wide):
                some = pl.ds(column + n * width, width)
                own = w_g.at[group, some, deep] if transpose else w_g.at[group, deep, some]
                plgpu.copy_gmem_to_smem(own, w_s.at[slot, n], full)
            for n in range(tall):
                part = x_g.at[pl.ds(pl.multiple_of(begin + n * M, ALIGN), low), deep]
                plgpu.copy_gmem_to_smem(part, x_s.at[slot, n, pl.ds(0, low)], full)

        fill(steps, stages, step, slots)

    roles(tall * wide, compute, load)


def accumulate(steps: Any, slots: Any, shape: tuple[int, int], product: Any) -> jax.Array:
    """The sum of product(k, slot, acc) over all steps; frees a slot when its product is done."""
    stages = slots["full"].shape[0]

    def free(k):
        done = slots["free"].at[lax.rem(k + stages, stages)]
        pl.when(k >= 0)(lambda: plgpu.barrier_arrive(done))

    def run(acc):
        def step(k, _):
            slot = lax.rem(k, stages)
            plgpu.barrier_wait(slots["full"].at[slot])
            product(k, slot, acc)
            plgpu.wgmma_wait(1)  # for the product before this one
            free(k - 1)

        lax.fori_loop(0, steps, step, None)
        total = acc[...]
        free(steps - 1)
        return total

    return pl.run_scoped(run, accumulator(shape))


def copy_rows(y_s: Ref, first: Any, rows: Any, most: int, y_g: Ref, place: Any) -> None:
    """Copy `rows` rows of shared memory from `first` on, at most `most`, a power of two, to the
    (row, column) `place` of y_g. A copy has a fixed number of rows: there is one for every bit."""
    size, at = most, 0
    while size:
        part = rows & size

        def copy(size=size, at=at):
            target = y_g.at[pl.ds(place[0] + at, size), pl.ds(place[1], y_s.shape[1])]
            plgpu.copy_smem_to_gmem(y_s.at[pl.ds(first + at, size)], target)

        pl.when(part != 0)(copy)
        at, size = at + part, size // 2
    plgpu.wait_smem_to_gmem(0)


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


def fill(steps: Any, stages: int, step: Any, slots: Any) -> None:
    """Run step(k, slot) for all steps, each when its slot is free, and wait for the last ones."""

    def fill_slot(k, _):
        slot = lax.rem(k, stages)
        pl.when(k >= stages)(lambda: plgpu.barrier_wait(slots["free"].at[slot]))
        step(k, slot)

    def drain(k, _):
        plgpu.barrier_wait(slots["free"].at[lax.rem(k, stages)])

    lax.fori_loop(0, steps, fill_slot, None)
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)


def outer_products(
    x: jax.Array, dy: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """x^T dy over the rows of every group: x [rows, K], dy [rows, N] -> [G, K, N]."""
    K, N, G = x.shape[1], dy.shape[1], len(sizes)
    tall = 2 if K % (2 * M) == 0 else 1
    width, stages = (2 * M if N % (2 * M) == 0 else M), 4
    ends = jnp.cumsum(sizes)
    return kernel(
        _grouped_outer_products,
        out=jax.ShapeDtypeStruct((G, K, N), bf16),
        grid={"i": G * (K // (tall * M)) * (N // width)},
        scratch={
            "x_s": tile((stages, tall, DEPTH, M)),
            "dy_s": tile((stages, DEPTH, width)),
            "dw_s": tile((tall, M, width)),
            "slots": ring(stages, 1 + tall, tall),
        },
        interpret=interpret,
        warpgroups=tall + 1,
    )(_aligned(x, interpret), _aligned(dy, interpret), jnp.stack([ends - sizes, ends]))


def _grouped_outer_products(
    x_g: Ref, dy_g: Ref, places_g: Ref, dw_g: Ref, *,
    wg: Warpgroup, x_s: Ref, dy_s: Ref, dw_s: Ref, slots: Any,
) -> None:  # fmt: skip
    stages, tall, width = dy_s.shape[0], *dw_s.shape[::2]
    down, across = dw_g.shape[1] // (tall * M), dw_g.shape[2] // width
    i = lax.axis_index("i")
    group, rest = lax.div(i, down * across), lax.rem(i, down * across)
    top, column = lax.div(rest, across) * (tall * M), lax.rem(rest, across) * width
    start, end = (places_g[n, group] for n in range(2))
    begin = lax.div(start, ALIGN) * ALIGN
    steps = jnp.where(end > start, lax.div(end - begin + DEPTH - 1, DEPTH), 0)

    def compute(w: jax.Array) -> None:
        def product(k, slot, acc):
            left, right = x_s.at[slot, w], dy_s.at[slot]
            first, last = start - begin - k * DEPTH, end - begin - k * DEPTH

            @pl.when((first > 0) | (last < DEPTH))
            def blank_both():  # both warpgroups write the same values into `right`
                blank(left, first, last)
                blank(right, first, last)
                plgpu.commit_smem()

            plgpu.wgmma(acc, transposed(left), right)

        dw_s[w] = accumulate(steps, slots, (M, width), product).astype(bf16)
        plgpu.commit_smem()
        place = dw_g.at[group, pl.ds(top + w * M, M), pl.ds(column, width)]
        plgpu.copy_smem_to_gmem(dw_s.at[w], place)
        plgpu.wait_smem_to_gmem(0)

    def blank(x: Ref, first: jax.Array, last: jax.Array) -> None:
        """Zeros in all rows but those from `first` to `last`: they are of other groups."""
        row = along_rows(plgpu.broadcasted_iota(i32, x.shape[:1], 0, layout=ROWS), x.shape[1])
        mine = (row >= first) & (row < last)
        x[...] = jnp.where(mine, plgpu.load(x, layout=MATRIX), jnp.bfloat16(0))

    def load() -> None:
        def step(k, slot):
            full = slots["full"].at[slot]
            deep = pl.ds(pl.multiple_of(begin + k * DEPTH, ALIGN), DEPTH)
            plgpu.copy_gmem_to_smem(dy_g.at[deep, pl.ds(column, width)], dy_s.at[slot], full)
            for n in range(tall):
                part = x_g.at[deep, pl.ds(top + n * M, M)]
                plgpu.copy_gmem_to_smem(part, x_s.at[slot, n], full)

        fill(steps, stages, step, slots)

    roles(tall, compute, load)
