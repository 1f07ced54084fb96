"""What the Pallas Mosaic GPU (Hopper) kernels share.

Kernels use lane semantics with explicit register layouts, one warpgroup per CTA. Two switches keep
one source for the GPU and for the interpreter on a CPU, which knows neither matrix products with a
register operand nor accumulators with a start value: see `Warpgroup`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.compat import ACC, SwizzleTransform, TilingTransform

MATRIX = plgpu.Layout.WGMMA
ROWS, COLUMNS = MATRIX.reduce(1), MATRIX.reduce(0)
Ref = Any


def tile(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for matrices [..., m, n]: 128-byte swizzled tiles, as wgmma and TMA want."""
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (TilingTransform((8, width)), SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def accumulator(shape: tuple[int, ...]) -> Any:
    """Room for the float32 result of matrix products, for `pl.run_scoped`; it starts as zeros."""
    return ACC(shape, jnp.float32)


def vector(ref: Ref, layout: Any = ROWS) -> jax.Array:
    """Load a vector, one entry per row (or column) of a matrix."""
    return plgpu.load(ref, layout=layout)


def matrix(ref: Ref) -> jax.Array:
    """Load a matrix as float32."""
    return plgpu.load(ref, layout=MATRIX).astype(jnp.float32)


def along_rows(v: jax.Array, columns: int) -> jax.Array:
    """[m] -> [m, columns], entry i in row i."""
    return lax.broadcast_in_dim(v, (v.shape[0], columns), [0])


def along_columns(v: jax.Array, rows: int) -> jax.Array:
    """[n] -> [rows, n], entry j in column j."""
    return lax.broadcast_in_dim(v, (rows, v.shape[0]), [1])


def transposed(ref: Ref) -> Ref:
    """A matrix in shared memory, transposed without moving it."""
    return ref.transpose((1, 0))


def iota(n: int, axis: int) -> jax.Array:
    """[n, n] int32 row (axis 0) or column (axis 1) numbers."""
    return plgpu.broadcasted_iota(jnp.int32, (n, n), axis, layout=MATRIX)


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """Matrix products of one warpgroup.

    Attributes:
      registers: left operands come from registers and accumulators start from a value (GPU);
        otherwise from shared memory, and the value is added afterwards (interpreter). Some ptxas
        releases before 13.3 are known to overwrite such registers too early; with that of
        CUDA 13.0, errors on an H100 were within 3% of those of an emulation of the roundings.
    """

    registers: bool = True

    def operand(self, x: jax.Array, room: Ref) -> Any:
        """float32 [m, k] as a bfloat16 left operand; `room` is shared memory of that shape, free
        until the product is done (not touched with `registers`)."""
        x = plgpu.layout_cast(x.astype(jnp.bfloat16), MATRIX)
        if self.registers:
            return x
        room[...] = x
        plgpu.commit_smem()
        return room

    def halves(self, x: jax.Array, rooms: tuple[Ref, Ref]) -> tuple[Any, Any]:
        """x as the sum of two left operands, exact to 2^-16."""
        high = x.astype(jnp.bfloat16).astype(jnp.float32)
        return self.operand(high, rooms[0]), self.operand(x - high, rooms[1])

    def matmul(self, shape: tuple[int, int], *pairs: tuple[Any, Any]) -> jax.Array:
        """sum of a @ b over the pairs, float32."""

        def run(acc):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(run, accumulator(shape))

    def accumulate(self, start: jax.Array, add: Callable[[Ref], None]) -> jax.Array:
        """start + what `add(acc)` adds to the accumulator by `plgpu.wgmma`."""
        if self.registers:
            init = plgpu.layout_cast(start, MATRIX)
            return plgpu.layout_cast(pl.run_state(add)(ACC.init(init)), MATRIX)

        def run(acc):
            add(acc)
            return acc[...]

        return start + pl.run_scoped(run, accumulator(start.shape))

    def accumulate_both(
        self, a: jax.Array, b: jax.Array, add: Callable[[Ref, Ref], None]
    ) -> tuple[jax.Array, jax.Array]:
        """a and b plus what `add` adds to their accumulators."""
        if self.registers:
            start: Any = tuple(ACC.init(plgpu.layout_cast(x, MATRIX)) for x in (a, b))
            a, b = pl.run_state(lambda accs: add(*accs))(start)
            return plgpu.layout_cast(a, MATRIX), plgpu.layout_cast(b, MATRIX)

        def run(*accs):
            add(*accs)
            return accs[0][...], accs[1][...]

        sums = pl.run_scoped(run, accumulator(a.shape), accumulator(b.shape))
        return a + sums[0], b + sums[1]

    def before_last(self, acc: Ref) -> jax.Array:
        """An accumulator to which the last product does not add, while that product runs."""
        return plgpu.wgmma_accumulator_load(acc, wait_n=1) if self.registers else acc[...]


def store(*pairs: tuple[Ref, Ref]) -> None:
    """Copy (shared memory, device memory) pairs out, and wait until they are there."""
    plgpu.commit_smem()
    for source, target in pairs:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def kernel(
    body: Callable[..., None],
    *,
    out: Any,
    grid: dict[str, int],
    scratch: dict[str, Any],
    interpret: bool,
    warpgroups: int = 1,
    barriers: bool = True,
    **static: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` with lane semantics; the body gets `static` and its `wg` (`Warpgroup`).

    With several warpgroups it reads its own number from the axis "warpgroup". A body whose threads
    read nothing that others write needs no `barriers` around its stores.
    """
    options: Any = {"interpret": plgpu.InterpretGPUParams()}
    if not interpret:
        lane = plgpu.LoweringSemantics.Lane
        params = plgpu.CompilerParams(
            approx_math=True, lowering_semantics=lane, unsafe_no_auto_barriers=not barriers
        )
        options = {"compiler_params": params}
    if warpgroups > 1:
        options |= {"num_threads": warpgroups, "thread_name": "warpgroup"}
    return plgpu.kernel(
        functools.partial(body, wg=Warpgroup(registers=not interpret), **static),
        out_type=out,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        kernel_name=body.__name__.strip("_"),
        **options,
    )
