"""RMSNorm on Hopper GPUs: Pallas Mosaic kernels, one pass over memory each way.

A block of 128 threads takes a few rows, one after the other: hidden states are spread over all of
them, of heads (64 or 128 channels) a warp holds whole ones. The backward pass computes statistics
and the gate again from what came in. Sums of the weight's gradient leave as one row per block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.compat import store_rows
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.pallas_kernels.mosaic import kernel

Ref = Any
f32 = jnp.float32


class Static(NamedTuple):
    eps: float
    zero_centered: bool
    cast_first: bool
    residual: bool
    gate: bool
    rows: int
    together: int
    vector: int
    trained: bool = False


class _Rows:
    """Rows [d], or heads [R, D], in registers, and sums along the last axis."""

    def __init__(self, static: Static, shape: tuple[int, ...]):
        self.static, self.shape, self.d = static, shape, shape[-1]
        v = static.vector
        if len(shape) == 1:
            tiles, warps, lanes = ((128 * v,), (32 * v,), (v,)), -3, (-2,)
        elif 32 * v == self.d:
            tiles, warps, lanes = ((4, self.d), (v,)), -3, (-2,)
        else:
            heads = 32 * v // self.d
            tiles, warps, lanes = ((4 * heads, self.d), (heads, self.d), (v,)), -5, (-3, -2)
        self.layout = plgpu.Layout.TILED(
            plgpu.Tiling(tiles), warp_dims=(warps,), lane_dims=lanes, vector_dim=-1
        )

    def load(self, ref: Ref) -> jax.Array:
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(f32)

    def weight(self, ref: Ref) -> jax.Array:
        if len(self.shape) == 1:
            w = self.load(ref)
        else:
            w = plgpu.load(ref, layout=self.layout.reduce(0), optimized=False).astype(f32)
            w = plgpu.layout_cast(lax.broadcast_in_dim(w, self.shape, (1,)), self.layout)
        return 1.0 + w if self.static.zero_centered else w

    def mean(self, x: jax.Array) -> jax.Array:
        """Of each row, for all of its entries."""
        if len(self.shape) == 1:
            return jnp.sum(x) * (1.0 / self.d)
        mean = jnp.sum(x, axis=1) * (1.0 / self.d)
        return plgpu.layout_cast(lax.broadcast_in_dim(mean, self.shape, (0,)), self.layout)

    def normalized(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = lax.rsqrt(self.mean(x * x) + self.static.eps)
        return x * inverse, inverse


def _blocks(n: int, static: Static):
    """The first row of this block, and whether row i counts: the last block may overlap."""
    begin = lax.axis_index("i") * static.rows
    return jnp.minimum(begin, n - static.rows), lambda i: i >= begin


def _forward_body(x: Ref, w: Ref, *refs: Ref, wg: Any, static: Static) -> None:
    refs = list(refs)
    other = refs.pop(0) if static.residual or static.gate else None
    y_ref, *sum_ref = refs
    rows = _Rows(static, x.shape[1:])
    weight = rows.weight(w)
    first, _ = _blocks(x.shape[0], static)

    def step(i: jax.Array, _: None) -> None:
        at = [first + i * static.together + u for u in range(static.together)]
        xs = [rows.load(x.at[n]) for n in at]
        others = [rows.load(other.at[n]) for n in at] if other is not None else [None] * len(at)
        for n, a, b in zip(at, xs, others, strict=True):
            if static.residual:
                total = (a + b).astype(y_ref.dtype)
                store_rows(sum_ref[0].at[n], total)
                a = total.astype(f32)
            y, _ = rows.normalized(a)
            if static.cast_first:
                y = y.astype(y_ref.dtype).astype(f32)
            y = y * weight
            if static.gate:
                y = y * b / (1.0 + jnp.exp(-b))
            store_rows(y_ref.at[n], y.astype(y_ref.dtype))

    lax.fori_loop(0, static.rows // static.together, step, None)


def _backward_body(x: Ref, w: Ref, dy: Ref, *refs: Ref, wg: Any, static: Static) -> None:
    refs = list(refs)
    other = refs.pop(0) if static.residual or static.gate else None  # gradient of the sum, or gate
    dx_ref = refs.pop(0)
    d_gate = refs.pop(0) if static.gate else None
    rows = _Rows(static, x.shape[1:])
    weight = rows.weight(w)
    first, mine = _blocks(x.shape[0], static)

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = [first + i * static.together + u for u in range(static.together)]
        loaded = [[rows.load(r.at[n]) for r in (x, dy, other) if r is not None] for n in at]
        for n, (a, g, *more) in zip(at, loaded, strict=True):
            y, inverse = rows.normalized(a)
            if static.gate:
                (b,) = more
                sigmoid = 1.0 / (1.0 + jnp.exp(-b))
                slope = sigmoid * (1.0 + b * (1.0 - sigmoid))
                store_rows(d_gate.at[n], (g * y * weight * slope).astype(dx_ref.dtype))
                g = g * (b * sigmoid)
            if static.trained:
                sums = (sums[0] + jnp.where(mine(n), g * y, 0.0),)
            g = g * weight
            dx = inverse * (g - y * rows.mean(g * y))
            if static.residual:
                dx += more[0]
            store_rows(dx_ref.at[n], dx.astype(dx_ref.dtype))
        return sums

    sums = ()
    if static.trained:
        sums = (plgpu.layout_cast(jnp.zeros(rows.shape, f32), rows.layout),)
    sums = lax.fori_loop(0, static.rows // static.together, step, sums)
    if static.trained:
        store_rows(refs[0].at[lax.axis_index("i")], sums[0])


def launch(body, static: Static, arrays, outs, interpret=False):
    return kernel(
        body, out=tuple(outs), grid={"i": pl.cdiv(arrays[0].shape[0], static.rows)}, scratch={},
        barriers=False, interpret=interpret, static=static,
    )(*arrays)  # fmt: skip
