"""Short convolution, SiLU and head norm on Hopper GPUs: Pallas Mosaic kernels, one pass each way.

A block of 128 threads owns a few channels, whole heads, and walks over tokens: what the
convolution needs of earlier tokens (backward also of later ones) stays in registers, so that
every array is read or written once. The backward pass keeps no activation, it computes them from x
again. Memory bounds both kernels; what a thread reads of a token lies side by side (`_layout`).
"""

from __future__ import annotations

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
from hmf_jax.pallas_kernels.ops.causal_conv1d.chunked import causal_conv1d_chunked
from hmf_jax.pallas_kernels.ops.causal_conv1d.inputs import Inputs, L2Norm
from hmf_jax.pallas_kernels.segments import documents, leading

Ref = Any
f32 = jnp.float32
MOST_TAPS = 4
SHORTEST = 64
VECTOR = 4
# Tokens of a block, and how many of them are read at once: forward, backward.
WALKS = (32, 8), (64, 4)


class Static(NamedTuple):
    """Which kernel.

    Attributes:
      taps: K, rows of the weights; behind them, if `bias`, is a row of biases.
      packed: whether every token says how many tokens back it sees (`_reach`).
      norm: of the heads afterwards, or None.
      tokens, together: of a block, and how many of them are read at once.
      vector: channels of a token that a thread holds.
    """

    taps: int
    bias: bool
    silu: bool
    packed: bool
    norm: L2Norm | None
    tokens: int
    together: int
    vector: int


def causal_conv1d_mosaic(
    inputs: Inputs, *, activation: str | None, norm: L2Norm | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.causal_conv1d`; which arguments it takes: `why_not`."""
    y = _convolve((activation == "silu", norm, interpret), inputs)
    _, state = causal_conv1d_chunked(inputs, activation=None)  # of which only the state is computed
    return y, state


def why_not(inputs: Inputs, norm: L2Norm | None, parts: int) -> str | None:
    """Why the kernels cannot run these arguments, channels split over so many devices, on this
    machine; None if they can."""
    (_, T, C), K = inputs.x.shape, len(inputs.weight)
    if reason := why_no_hopper():
        return reason
    if inputs.x.dtype != jnp.bfloat16:
        return f"its kernels take bfloat16, got {inputs.x.dtype}"
    if not 2 <= K <= MOST_TAPS:
        return f"its kernels take 2 to {MOST_TAPS} taps, got {K}"
    if norm is not None and norm.head_dim not in (64, 128):
        return f"its kernels normalise heads of 64 and 128 channels, got {norm.head_dim}"
    if C // parts % (128 * VECTOR):
        return f"its kernels take channels divisible by {128 * VECTOR}, got {C // parts}"
    if T < SHORTEST:
        return f"it is for {SHORTEST} tokens and more, got {T}"
    if inputs.segment_ids is not None and inputs.lengths is None:
        return "its kernels want padding at the end, and segment_ids without lengths"
    return None


def _layout(D: int, vector: int) -> Any:
    """Heads [R, D] of one token in registers: a thread holds `vector` neighbouring channels, a
    warp whole heads, so that sums over a head take a few shuffles."""
    heads = 32 * vector // D
    if heads == 1:
        tiles, warps, lanes = ((4, D), (vector,)), -3, (-2,)
    else:
        tiles, warps, lanes = ((4 * heads, D), (heads, D), (vector,)), -5, (-3, -2)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(warps,), lane_dims=lanes, vector_dim=-1
    )


class _Walk:
    """What both kernels do with the channels of a block: read, convolve, normalise."""

    def __init__(self, static: Static, x: Ref, w: Ref, reach: Ref | None):
        self.static, self.x, self.reach = static, x, reach
        D = x.shape[-1]
        self.layout = _layout(D, static.vector)
        rows = 128 * static.vector // D
        self.shape = (rows, D)
        self.heads = pl.ds(lax.axis_index("c") * rows, rows)
        self.row = lax.axis_index("b")
        self.first = jnp.minimum(lax.axis_index("t") * static.tokens, x.shape[1] - static.tokens)
        self.w = [self.load(w.at[i, self.heads]) for i in range(w.shape[0])]

    def load(self, ref: Ref) -> jax.Array:
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(f32)

    def before(self, state: Ref) -> tuple[jax.Array, ...]:
        """The K - 1 tokens before the first one, oldest first."""
        steps = range(self.static.taps - 1, 0, -1)
        old = [self.load(state.at[self.row, self.static.taps - 1 - j, self.heads]) for j in steps]
        new = [self.token(self.x, jnp.maximum(self.first - j, 0)) for j in steps]
        return tuple(jnp.where(self.first > 0, n, o) for n, o in zip(new, old, strict=True))

    def token(self, ref: Ref, t: jax.Array) -> jax.Array:
        return self.load(ref.at[self.row, t, self.heads])

    def reached(self, t: jax.Array, steps: int, x: jax.Array) -> jax.Array:
        """x where token t sees so many tokens back, else 0."""
        if self.reach is None:
            return x
        return jnp.where(self.reach[self.row, t] >= steps, x, 0.0)

    def taps(self, window: list[jax.Array], t: jax.Array) -> list[jax.Array]:
        K = self.static.taps
        return [self.reached(t, K - 1 - i, x) for i, x in enumerate(window)]

    def convolve(self, taps: list[jax.Array]) -> jax.Array:
        z = self.w[-1] if self.static.bias else 0.0
        for w, x in zip(self.w, taps, strict=False):
            z += w * x
        return z

    def spread(self, x: jax.Array) -> jax.Array:
        """[R] -> [R, D]"""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, (0,)), self.layout)

    def norms(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """1 / |y| as the norm has it [R], and minus its derivative by |y|, over |y|."""
        norm = self.static.norm
        assert norm is not None
        square = jnp.sum(y * y, axis=1)
        if norm.under_root:
            inverse = lax.rsqrt(square + norm.eps)
            return inverse, inverse * inverse * inverse
        # Zero vectors stay zero, and so do their gradients.
        root = jnp.where(square > 0.0, lax.rsqrt(jnp.where(square > 0.0, square, 1.0)), 0.0)
        inverse = 1.0 / (square * root + norm.eps)
        return inverse, inverse * inverse * root


def _forward_body(x: Ref, w: Ref, state: Ref, *refs: Ref, wg: Any, static: Static) -> None:
    reach, y_ref = refs if static.packed else (None, *refs)
    walk = _Walk(static, x, w, reach)

    def step(i: jax.Array, window: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        t = walk.first + i * static.together
        rows = [*window, *(walk.token(x, t + u) for u in range(static.together))]
        for u in range(static.together):
            y = walk.convolve(walk.taps(rows[u : u + static.taps], t + u))
            if static.silu:
                y = y / (1.0 + jnp.exp(-y))
            y = walk.reached(t + u, 0, y).astype(y_ref.dtype)
            if static.norm is not None:
                y = y.astype(f32)
                y = (y * walk.spread(walk.norms(y)[0])).astype(y_ref.dtype)
            store_rows(y_ref.at[walk.row, t + u, walk.heads], y)
        return tuple(rows[static.together :])

    lax.fori_loop(0, static.tokens // static.together, step, walk.before(state))


def _backward_body(x: Ref, w: Ref, state: Ref, *refs: Ref, wg: Any, static: Static) -> None:
    refs = list(refs)
    reach = refs.pop(0) if static.packed else None
    g_ref, dx_ref, *dw_ref = refs
    K, T, walk = static.taps, x.shape[1], _Walk(static, x, w, reach)

    def derivative(t: jax.Array, at: jax.Array, x_row: jax.Array, g: jax.Array, window):
        """dz of token t, whose rows were read at `at` (t, or the last one), and its taps."""
        taps = walk.taps([*window, x_row], at)
        z = walk.convolve(taps)
        if static.silu:
            sigmoid = 1.0 / (1.0 + jnp.exp(-z))
            y, slope = z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))
        else:
            y, slope = z, None
        if static.norm is not None:
            y = y.astype(dx_ref.dtype).astype(f32)
            inverse, factor = walk.norms(y)
            along = factor * jnp.sum(y * g, axis=1)
            g = walk.spread(inverse) * g - walk.spread(along) * y
        dz = g if slope is None else g * slope
        dz = walk.reached(at, 0, dz)
        return jnp.where(t < T, dz, 0.0), taps

    def read(t):
        at = jnp.minimum(t, T - 1)
        return at, walk.token(x, at), walk.token(g_ref, at)

    def add(sums, dz, taps):
        new = [s + dz * tap for s, tap in zip(sums, taps, strict=False)]
        return (*new, sums[-1] + dz) if static.bias else tuple(new)

    window, later = walk.before(state), ()
    sums = ()
    if dw_ref:
        zero = plgpu.layout_cast(jnp.zeros(walk.shape, f32), walk.layout)
        sums = (zero,) * len(walk.w)
    for u in range(K - 1):  # the first tokens only prepare; in the first block they count
        t = walk.first + u
        at, x_row, g = read(t)
        dz, taps = derivative(t, at, x_row, g, window)
        if dw_ref:
            sums = add(sums, jnp.where(lax.axis_index("t") == 0, dz, 0.0), taps)
        window, later = (*window[1:], x_row), (*later, dz)

    def step(i: jax.Array, carry):
        window, later, sums = carry
        start = walk.first + i * static.together + K - 1
        rows = [read(start + u) for u in range(static.together)]
        for u, (at, x_row, g) in enumerate(rows):
            t = start + u
            dz, taps = derivative(t, at, x_row, g, window)
            if dw_ref:
                # The last block may overlap the one before.
                mine = t >= lax.axis_index("t") * static.tokens + K - 1
                sums = add(sums, jnp.where(mine, dz, 0.0), taps)
            later = (*later, dz)
            dx = 0.0
            for j, d in enumerate(later):  # token t - K + 1 is j steps back from that of d
                dx += walk.w[K - 1 - j] * walk.reached(jnp.minimum(t - K + 1 + j, T - 1), j, d)
            store_rows(dx_ref.at[walk.row, t - K + 1, walk.heads], dx.astype(dx_ref.dtype))
            window, later = (*window[1:], x_row), later[1:]
        return window, later, sums

    carry = lax.fori_loop(0, static.tokens // static.together, step, (window, later, sums))
    for i, total in enumerate(carry[2]):
        store_rows(dw_ref[0].at[walk.row, lax.axis_index("t"), i, walk.heads], total)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options: tuple[bool, L2Norm | None, bool], inputs: Inputs) -> jax.Array:
    y, *_ = _launch(_forward_body, 0, options, inputs, _as_heads(inputs.x, options[1]).shape)
    return y.reshape(inputs.x.shape)


def _convolve_forward(options, inputs):
    values = jax.tree.map(lambda p: p.value, inputs)
    trained = any(p is not None and p.perturbed for p in (inputs.weight, inputs.bias))
    # Residuals hold no flags, but may be absent.
    return _convolve(options, values), (values, jnp.zeros(()) if trained else None)


def _convolve_backward(options, saved, dy):
    inputs, trained = saved
    x, weight, bias, state, segment_ids, lengths = inputs
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(x.shape, x.dtype)
    shape = _as_heads(x, options[1]).shape
    dy_heads = dy.astype(x.dtype).reshape(shape)
    dx, *dw = _launch(
        _backward_body, 1, options, inputs, shape, dy_heads, weights=trained is not None
    )
    d_weight = jnp.zeros_like(weight)
    d_bias = None if bias is None else jnp.zeros_like(bias)
    if dw:
        total = jnp.sum(dw[0], axis=(0, 1)).reshape(-1, x.shape[2])
        d_weight = total[: len(weight)].astype(weight.dtype)
        d_bias = None if bias is None else total[-1].astype(bias.dtype)

    def first_tokens(state):
        K = len(weight)
        few = Inputs(
            x[:, : K - 1], weight, bias, state,
            None if segment_ids is None else segment_ids[:, : K - 1],
            None if lengths is None else jnp.minimum(lengths, K - 1),
        )  # fmt: skip
        return causal_conv1d_chunked(
            few, activation="silu" if options[0] else None, norm=options[1]
        )[0]

    (d_state,) = jax.vjp(first_tokens, state)[1](dy[:, : len(weight) - 1].astype(x.dtype))
    found: Any = Inputs(dx.reshape(x.shape), d_weight, d_bias, d_state, None, None)
    return (found,)


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


def _launch(body, backward, options, inputs, shape, *more, weights=False):
    """Run a kernel on the arrays as heads [B, T, H, D] (`shape`)."""
    silu, norm, interpret = options
    B, T, H, D = shape
    K, bias, reach = len(inputs.weight), inputs.bias, _reach(inputs)
    tokens, together = WALKS[backward]
    static = Static(K, bias is not None, silu, reach is not None, norm, tokens, together, VECTOR)
    w = inputs.weight if bias is None else jnp.concatenate([inputs.weight, bias[None]])
    blocks = pl.cdiv(T, tokens)
    out = [jax.ShapeDtypeStruct(shape, inputs.x.dtype)]
    if weights:
        out.append(jax.ShapeDtypeStruct((B, blocks, len(w), H, D), f32))
    run = kernel(
        body,
        out=tuple(out),
        grid={"c": H * D // (128 * VECTOR), "t": blocks, "b": B},
        scratch={},
        barriers=False,
        interpret=interpret,
        static=static,
    )
    arrays = [inputs.x.reshape(shape), w.astype(f32).reshape(-1, H, D)]
    arrays.append(inputs.state.reshape(B, K - 1, H, D))
    return run(*arrays, *([] if reach is None else [reach]), *more)


def _as_heads(x: jax.Array, norm: L2Norm | None) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, 128 if norm is None else norm.head_dim)


def _reach(inputs: Inputs) -> jax.Array | None:
    """How many tokens back each one sees, int32 [B, T]: K - 1, less at the start of documents, -1
    at padding. None where all see K - 1."""
    K, T = len(inputs.weight), inputs.x.shape[1]
    if inputs.lengths is None:
        return None
    if inputs.segment_ids is None:
        return jnp.where(leading(inputs.lengths, T), K - 1, -1)
    doc, valid = documents(inputs.segment_ids, inputs.lengths)
    before = jnp.pad(doc, ((0, 0), (K - 1, 0)))
    same = sum((before[:, i : i + T] == doc).astype(jnp.int32) for i in range(K - 1))
    return jnp.where(valid, same, -1)
