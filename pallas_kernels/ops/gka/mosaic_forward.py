"""GKA's solve and readout on Hopper, and what its backward pass shares: see mosaic.py."""

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
    iota,
    kernel,
    matrix,
    store,
    tile,
    transposed,
    vector,
)
from hmf_jax.pallas_kernels.ops.gka.mosaic_scan import (
    ALPHA,
    BETA2,
    CUM,
    CUM_KK,
    DOC,
    ROWS,
    START,
    START_KK,
    C,
    Ref,
    bf16,
    f32,
)


def _pairs(gates: Ref, row: int, transpose: bool) -> tuple[jax.Array, jax.Array]:
    """A row of the gates as x_i and x_j of all pairs [i, j], or [j, i] if transposed."""
    down = along_rows(vector(gates.at[row]), C)
    across = along_columns(vector(gates.at[row], COLUMNS), C)
    return (across, down) if transpose else (down, across)


def _after(gates: Ref, transpose: bool = False) -> jax.Array:
    """Whether i >= j in the same document, [i, j] or transposed."""
    i, j = iota(C, int(transpose)), iota(C, int(not transpose))
    doc_i, doc_j = _pairs(gates, DOC, transpose)
    return (i >= j) & (doc_i == doc_j)


def decay(gates: Ref, cum: int, transpose: bool = False) -> jax.Array:
    """M [C, C], or its transpose."""
    cum_i, cum_j = _pairs(gates, cum, transpose)
    return jnp.where(_after(gates, transpose), jnp.exp(jnp.minimum(cum_i - cum_j, 0.0)), 0.0)


def _norm(wg: Warpgroup, k_s: Ref, h_s: Ref, gates: Ref, m: jax.Array, row: Ref) -> jax.Array:
    """||H_i||_F [C], all float32 sums; `row` is free shared memory [C].

    With H' = e^{g_i} H_{i-1}: ||H_i||^2 = ||H'||^2 + 2 beta_i^2 k_i^T H' k_i + beta_i^4 |k_i|^4.
    """
    D = k_s.shape[-1]
    beta2 = along_columns(vector(gates.at[BETA2], COLUMNS), C)
    start = vector(gates.at[START_KK])
    gram = wg.matmul((C, C), (k_s, transposed(k_s)))
    quadratic = jnp.sum(wg.matmul((C, D), (k_s, h_s)) * matrix(k_s), axis=1)
    twice = jnp.where(iota(C, 0) == iota(C, 1), 1.0, 2.0)
    row[...] = 2.0 * start * quadratic + jnp.sum(twice * m * beta2 * gram * gram, axis=1)
    plgpu.commit_smem()
    state = matrix(h_s)
    square = jnp.sum(jnp.sum(state * state, axis=1), axis=0)
    square = start * start * square
    square += jnp.sum(m * m * beta2 * along_columns(vector(row, COLUMNS), C), axis=1)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def invert(f: jax.Array) -> jax.Array:
    """1 / f, 0 where f is 0 (every key was zero)."""
    return jnp.where(f > 0.0, 1.0 / jnp.where(f > 0.0, f, 1.0), 0.0)


def chebyshev(
    wg: Warpgroup,
    b_s: Ref,
    factor: jax.Array | None,
    k_s: Ref,
    h_s: Ref,
    gates: Ref,
    m: jax.Array,
    inverse: jax.Array,
    num_iter: jax.Array,
    ridge: float,
    m_s: Ref,
    rooms: tuple[Ref, Ref] | tuple[None, None],
) -> jax.Array:
    """z = f x, x ~ (H + ridge f I)^-1 (factor * b): step sizes depend on ridge only.

    The differences d_n = z_n - z_{n-1} live in the accumulator:
    d_{n+1} = (w - 1) d_n + w s (b - ridge z_n) - w s (H / f) z_n,  z_{n+1} = z_n + d_{n+1}.
    """
    D = k_s.shape[-1]
    step = 2 / (1 + 2 * ridge)
    contraction = (0.5 / (1 + 2 * ridge)) ** 2
    m_s[...] = m * along_columns(vector(gates.at[BETA2], COLUMNS), C) * along_rows(inverse, C)
    start = vector(gates.at[START_KK]) * inverse
    keys_t = transposed(k_s)

    def right(scale):
        scale = scale if factor is None else along_rows(scale * factor, D)
        return scale * matrix(b_s)

    def iterate(_, carry):
        z, d, w = carry
        w = 1.0 / (1.0 - contraction * w)
        ws = w * step

        def products(scores):
            plgpu.wgmma(scores, wg.operand(z, rooms[0]), keys_t)
            begin = (w - 1.0) * d + right(ws) - (ws * ridge) * z
            decayed = wg.operand(z * along_rows(start * -ws, D), rooms[0])

            def add(acc):
                plgpu.wgmma(acc, decayed, h_s)
                s = wg.before_last(scores)
                plgpu.wgmma(acc, wg.operand(s * (matrix(m_s) * -ws), rooms[1]), k_s)

            return wg.accumulate(begin, add)

        d = pl.run_scoped(products, accumulator((C, C)))
        return z + d, d, w

    z = right(jnp.float32(step))
    return lax.fori_loop(0, num_iter, iterate, (z, z, jnp.float32(2.0)))[0]


def rooms_for(D: int, interpret: bool) -> dict[str, Any]:
    """Shared memory for left operands, where they do not come from registers."""
    room = {"wide_s": tile((C, D)), "wide2_s": tile((C, D)), "square_s": tile((C, C))}
    return room if interpret else {}


def solve(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    states: jax.Array,
    gates: jax.Array,
    num_iter: jax.Array,
    *,
    ridge: float,
    scale: float,
    save: bool,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Norms, solve, blend and readout of all chunks.

    Args:
      q [B, T, H, D], k, v [B, T, K, D] bfloat16; states bfloat16 [2, B, H, n, D, D] as `scan`
      returns them; gates float32 [B, H, n, ROWS, C]; num_iter int32 [B].
      save: return what the backward pass needs, too.

    Returns:
      o [B, T, H, D]; with `save` also x [B, T, H, D] and f = ||H||_F [B, H, n, C] float32.
    """
    B, T, H, D = q.shape
    like_q = jax.ShapeDtypeStruct(q.shape, bf16)
    n = gates.shape[2]
    saved = (like_q, jax.ShapeDtypeStruct((B, H, n, C), f32)) if save else ()
    return kernel(
        _solve_body,
        out=(like_q, *saved),
        grid={"c": n, "h": H, "b": B},
        scratch={
            "q_s": tile((C, D)),
            "k_s": tile((C, D)),
            "v_s": tile((C, D)),
            "state_s": tile((D, D)),
            "m_s": tile((C, C), f32),
            "gates": plgpu.SMEM((ROWS, C), f32),
            "row": plgpu.SMEM((C,), f32),
            "first": plgpu.Barrier(num_arrivals=4),
            "second": plgpu.Barrier(num_arrivals=2),
        }
        | rooms_for(D, interpret),
        interpret=interpret,
        ridge=ridge,
        scale=scale,
    )(q, k, v, states, gates, num_iter)


def _solve_body(
    q_g, k_g, v_g, states_g, gates_g, num_iter_g, o_g, *saved,
    ridge: float, scale: float, wg: Warpgroup,
    q_s, k_s, v_s, state_s, m_s, gates, row, first, second,
    wide_s=None, wide2_s=None, square_s=None,
) -> None:  # fmt: skip
    c, h, b = lax.axis_index("c"), lax.axis_index("h"), lax.axis_index("b")
    t, kv, D = pl.ds(c * C, C), h // (q_g.shape[2] // k_g.shape[2]), q_g.shape[3]
    plgpu.copy_gmem_to_smem(gates_g.at[b, h, c], gates, first)
    plgpu.copy_gmem_to_smem(k_g.at[b, t, kv], k_s, first)
    plgpu.copy_gmem_to_smem(states_g.at[0, b, h, c], state_s, first)
    plgpu.copy_gmem_to_smem(q_g.at[b, t, h], q_s, first)
    plgpu.copy_gmem_to_smem(v_g.at[b, t, kv], v_s, second)
    plgpu.barrier_wait(first)

    m = decay(gates, CUM_KK)
    f = _norm(wg, k_s, state_s, gates, m, row)
    inverse = invert(f)
    z = chebyshev(
        wg, q_s, None, k_s, state_s, gates, m, inverse, num_iter_g[b], ridge, m_s,
        (wide_s, square_s),
    )  # fmt: skip
    plgpu.copy_gmem_to_smem(states_g.at[1, b, h, c], state_s, second)

    x = z * along_rows(inverse, D)
    q = matrix(q_s)
    q = q + along_rows(vector(gates.at[ALPHA]), D) * (x - q)
    beta2 = along_columns(vector(gates.at[BETA2], COLUMNS), C)
    # U is large along few directions and q~ small there: its rounding would show.
    high, low = wg.halves(q, (wide_s, wide2_s))
    scores = wg.matmul((C, C), (high, transposed(k_s)), (low, transposed(k_s)))
    plgpu.barrier_wait(second)
    read = wg.matmul((C, D), (high, state_s), (low, state_s))
    read *= along_rows(vector(gates.at[START]), D)
    scores = wg.operand(scores * decay(gates, CUM) * beta2, square_s)
    o = wg.accumulate(read, lambda acc: plgpu.wgmma(acc, scores, v_s))
    q_s[...] = (o * scale).astype(bf16)
    if saved:
        v_s[...] = x.astype(bf16)
        row[...] = f
    also = [(v_s, saved[0].at[b, t, h]), (row, saved[1].at[b, h, c])] if saved else []
    store((q_s, o_g.at[b, t, h]), *also)
