"""RMSNorm on Hopper GPUs: Pallas Mosaic kernels, one pass over memory each way.

A block of 128 threads takes a few rows, one after the other: hidden states are spread over all of
them, of heads (64 or 128 channels) a warp holds whole ones. The backward pass computes statistics
and the gate again from what came in. Sums of the weight's gradient leave as one row per block.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.compat import store_rows
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.pallas_kernels.mosaic import kernel
from hmf_jax.pallas_kernels.ops.rms_norm.inputs import Inputs, Options

Ref = Any
f32 = jnp.float32


FEWEST = 512
# Rows of a block, how many of them are read at once, neighbouring entries that a thread holds.
BLOCKS = {
    "states": {"forward": (8, 2, 8), "backward": (8, 1, 8), "trained": (16, 1, 8)},
    "heads": {"forward": (16, 4, 4), "backward": (16, 4, 4), "trained": (64, 4, 4)},
}
WIDEST = 8192
HEADS = (64, 128)


class Static(NamedTuple):
    """Which kernel.

    Attributes:
      options: of `rms_norm`.
      residual, gate: whether there is one (backward: whether s has a gradient).
      trained: whether the weight has a gradient.
      rows, together: of a block, and how many of them are read at once; for heads a row is as many
        of them as the threads hold.
      vector: neighbouring entries that a thread holds.
    """

    options: Options
    residual: bool
    gate: bool
    trained: bool
    rows: int
    together: int
    vector: int


def rms_norm_mosaic(
    inputs: Inputs, options: Options, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.rms_norm`; which arguments it takes: `why_not`."""
    return _norm((options, interpret), inputs)


def why_not(dtype: Any, shape: tuple[int, ...]) -> str | None:
    """Why the kernels cannot run x of this dtype, and of this shape on one device, on this machine;
    None if they can."""
    rows, d = math.prod(shape[:-1]), shape[-1]
    if reason := why_no_hopper():
        return reason
    if dtype != jnp.bfloat16:
        return f"its kernels take bfloat16, got {dtype}"
    if d not in HEADS and (d % 1024 or d > WIDEST):
        return f"its kernels take {HEADS} channels, or multiples of 1024 up to {WIDEST}, got {d}"
    if rows < FEWEST or (d in HEADS and rows % (512 // d)):
        return f"it is for {FEWEST} rows and more, for heads in multiples of {512 // d}, got {rows}"
    return None


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
        return 1.0 + w if self.static.options.zero_centered else w

    def mean(self, x: jax.Array) -> jax.Array:
        """Of each row, for all of its entries."""
        if len(self.shape) == 1:
            return jnp.sum(x) * (1.0 / self.d)
        mean = jnp.sum(x, axis=1) * (1.0 / self.d)
        return plgpu.layout_cast(lax.broadcast_in_dim(mean, self.shape, (0,)), self.layout)

    def normalized(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = lax.rsqrt(self.mean(x * x) + self.static.options.eps)
        return x * inverse, inverse


def _blocks(n: int, static: Static):
    """The first row of this block, and whether row i counts: the last block may overlap."""
    begin = lax.axis_index("i") * static.rows
    return jnp.minimum(begin, n - static.rows), lambda i: i >= begin


def _forward_body(x: Ref, w: Ref, *refs: Ref, wg: Any, static: Static) -> None:
    other, y_ref, *sum_ref = refs if static.residual or static.gate else (None, *refs)
    rows = _Rows(static, x.shape[1:])
    weight = rows.weight(w)
    first, _ = _blocks(x.shape[0], static)

    def step(i: jax.Array, carry: None) -> None:
        at = [first + i * static.together + u for u in range(static.together)]
        xs = [rows.load(x.at[n]) for n in at]
        others = xs if other is None else [rows.load(other.at[n]) for n in at]
        for n, a, b in zip(at, xs, others, strict=True):
            if static.residual:
                total = (a + b).astype(y_ref.dtype)
                store_rows(sum_ref[0].at[n], total)
                a = total.astype(f32)
            y, _ = rows.normalized(a)
            if static.options.cast_first:
                y = y.astype(y_ref.dtype).astype(f32)
            y = y * weight
            if static.gate:
                y = y * b / (1.0 + jnp.exp(-b))
            store_rows(y_ref.at[n], y.astype(y_ref.dtype))

    lax.fori_loop(0, static.rows // static.together, step, None)


def _backward_body(x: Ref, w: Ref, dy: Ref, *refs: Ref, wg: Any, static: Static) -> None:
    # The gradient of the sum, or the gate; of the results, those that are wanted.
    other, dx_ref, *out = refs if static.residual or static.gate else (None, *refs)
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
                store_rows(out[0].at[n], (g * y * weight * slope).astype(dx_ref.dtype))
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
        store_rows(out[-1].at[lax.axis_index("i")], sums[0])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static: tuple[Options, bool], inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    x, weight, residual, gate = inputs
    y, *total = _launch(static, x, weight, residual=residual, gate=gate)
    return y, total[0] if total else x


def _norm_forward(static, inputs):
    values = jax.tree.map(lambda p: p.value, inputs)
    y, total = _norm(static, values)
    # Residuals hold no flags, but may be absent.
    trained, added = inputs.weight.perturbed, values.residual is not None
    flags = tuple(jnp.zeros(()) if flag else None for flag in (trained, added))
    return (y, total), (total, values.weight, values.gate, *flags)


def _norm_backward(static, saved, cotangents):
    x, weight, gate, trained, added = saved
    dy, d_total = (None if isinstance(c, SymbolicZero) else c for c in cotangents)
    dy = jnp.zeros_like(x) if dy is None else dy
    joins = None if gate is not None else d_total
    dx, *rest = _launch(
        static, x, weight, dy=dy, residual=joins, gate=gate, trained=trained is not None
    )
    if gate is not None and d_total is not None:
        dx = dx + d_total
    d_gate = None if gate is None else rest.pop(0)
    d_weight = jnp.zeros_like(weight)
    if rest:
        d_weight = jnp.sum(rest[0].reshape(-1, len(weight)), axis=0).astype(weight.dtype)
    found: Any = Inputs(dx, d_weight, None if added is None else dx, d_gate)
    return (found,)


_norm.defvjp(_norm_forward, _norm_backward, symbolic_zeros=True)


def _launch(static, x, weight, *, dy=None, residual=None, gate=None, trained=False):
    """y (and the sum, with a residual); given dy, dx (and the gate's gradient, and sums that make
    that of the weight). The residual is then the gradient of the sum."""
    options, interpret = static
    d = x.shape[-1]
    heads = d in HEADS
    direction = "forward" if dy is None else "trained" if trained else "backward"
    rows, together, vector = BLOCKS["heads" if heads else "states"][direction]
    row = (128 * vector // d, d) if heads else (d,)
    given = [a for a in (dy, residual, gate) if a is not None]
    shape = x.shape
    x, *given = (a.astype(x.dtype).reshape(-1, *row) for a in (x, *given))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    blocks = pl.cdiv(len(x), rows)
    second = residual is not None if dy is None else gate is not None
    out = [like] * (1 + second)
    if trained:
        out.append(jax.ShapeDtypeStruct((blocks, *row), f32))
    run = kernel(
        _forward_body if dy is None else _backward_body,
        out=tuple(out),
        grid={"i": blocks},
        scratch={},
        barriers=False,
        interpret=interpret,
        static=Static(
            options, residual is not None, gate is not None, trained, rows, together, vector
        ),
    )
    found = run(x, weight, *given)
    return [a.reshape(shape) for a in found[: 1 + second]] + list(found[1 + second :])
