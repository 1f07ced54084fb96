"""Gated KalmaNet on Hopper GPUs: Pallas Mosaic kernels, forward and backward.

Tokens are cut into chunks of C = 64; per row and query head, with S and U the states of key
covariance and key-value products at the start of a chunk, i, j tokens of it,

    M_ij = exp(sum of g over (j, i]) for j <= i in one document, else 0
    a_i  = exp(sum of g up to i), 0 where another document began
    H_i x = a_i S x + sum_j M_ij beta_j^2 k_j (k_j . x)        (the Gram form of H_i x)

Five kernels, each reading q, k, v as they lie in memory [B, T, heads, D] (key/value heads are
shared, never repeated; beta only enters M and the weights of the scans):

    scan            states at all chunk starts (ends, in reverse); one CTA walks a head's chunks
    solve           ||H_i||_F, Chebyshev iteration, blend with q, readout; one CTA per chunk
    solve_backward  the same iteration on the gradient of x; implicit differentiation
    read_backward   gradients of k and v through the readout: inside a chunk, from suffix states
    gram_backward   gradient of k through H, likewise; those of g and beta

Products have bfloat16 operands and float32 accumulators; the iterate, the norms, the scans and all
decays are float32. States at chunk starts are stored in bfloat16 (they are operands only: the scan
itself never rounds).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import why_no_hopper
from pallas_kernels.mosaic import (
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
from pallas_kernels.segments import documents
from pallas_kernels.tuning import tuned

C = 64
bf16, f32 = jnp.bfloat16, jnp.float32
Ref = Any

# Rows of `gates` [B, H, n, rows, C]. *_KK belong to H, the others to U (they differ without decay
# of H). TAIL is the weight of a token in the state at the end of its chunk.
CUM_KK, START_KK, TAIL_KK, CUM, START, TAIL, BETA2, ALPHA, DOC, ROWS = range(10)
# Rows of what `solve_backward` returns, and of the gates of the reverse scans.
D_ALPHA, MU, QDQ, DH, GRAM, STEP_ROWS = range(6)
W_IN, W_KEEP, Z_IN, Z_KEEP, Z_GRAM, Z_STATE = range(6)
# Rows of what `gram_backward` returns.
D_G, D_BETA = range(2)
# The two terms of k . dL/dk: from reads inside the chunk, and later ones.
INSIDE, LATER = range(2)


# -- scans ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stream:
    """A recurrence S <- keep S + sum over pairs of a^T diag(weight) b [+ coef P].

    Attributes:
      operands: arrays [B, T, heads, D] it reads, by number.
      pairs: (a, b, weight): two places in `operands` and a row of the gates.
      keep: row of the gates; its last entry is the decay over a whole chunk.
      coef: row of the gates whose entries are all coef, P the given states; None = no such term.
    """

    operands: tuple[int, ...]
    pairs: tuple[tuple[int, int, int], ...]
    keep: int
    coef: int | None = None


FORWARD = (
    Stream(operands=(0,), pairs=((0, 0, TAIL_KK),), keep=START_KK),
    Stream(operands=(0, 1), pairs=((0, 1, TAIL),), keep=START),
)
# Operands q~, do, x, y, k: see `_backward`.
REVERSE = (
    Stream(
        operands=(2, 3, 4),
        pairs=((1, 0, Z_IN), (0, 1, Z_IN), (2, 2, Z_GRAM)),
        keep=Z_KEEP,
        coef=Z_STATE,
    ),
    Stream(operands=(0, 1), pairs=((0, 1, W_IN),), keep=W_KEEP),
)


def scan(
    streams: tuple[Stream, ...],
    operands: tuple[jax.Array, ...],
    gates: jax.Array,
    initial: jax.Array,
    prefix: jax.Array | None = None,
    *,
    split: bool = False,
    reverse: bool = False,
    stages: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Run recurrences over chunks.

    Args:
      operands: bfloat16 [B, T, heads, D]; head h of H reads head h // (H / heads).
      gates: float32 [B, H, n, rows, C].
      initial: float32 [len(streams), B, H, D, D].
      prefix: bfloat16 [streams, B, H, n, D, D], a state P for every chunk.
      split: multiply a * weight as the sum of two bfloat16 numbers, exact to 2^-16.
      reverse: walk from the last chunk to the first.
      stages: chunks whose loads are in flight, >= 2; None = as tuned.

    Returns:
      states before each chunk was added, bfloat16 [streams, B, H, n, D, D]; the last ones, float32
      [streams, B, H, D, D]; with `prefix`, <P, keep state> before the chunk was added, as sums
      over rows, float32 [streams, B, H, n, D].
    """
    S, B, H, D, _ = initial.shape
    n, rows = gates.shape[2:4]
    paired = prefix is not None
    if stages is None:
        stages = tuned("gka.scan", bf16, n * C, stages=4)["stages"]
    loads = [1 + len(s.operands) + paired for s in streams]
    room = max(len(s.operands) for s in streams)
    scratch = {
        "x_s": tile((stages, room, C, D)),
        "gates_s": plgpu.SMEM((stages, rows, C), f32),
        "left_s": tile((max(len(s.pairs) for s in streams) * (2 if split else 1), C, 64)),
        "out_s": tile((2, 64, D)),
        "state_s": tile((64, D), f32),
        "bars": [plgpu.Barrier(num_arrivals=m, num_barriers=stages) for m in loads],
        "bar": plgpu.Barrier(),
    }
    if paired:
        scratch |= {"prefix_s": tile((stages, 64, D)), "row_s": plgpu.SMEM((2, 64), f32)}
    products = (jax.ShapeDtypeStruct((S, B, H, n, D), f32),) if paired else ()
    return kernel(
        _scan_body,
        out=(
            jax.ShapeDtypeStruct((S, B, H, n, D, D), bf16),
            jax.ShapeDtypeStruct(initial.shape, f32),
            *products,
        ),
        grid={"half": D // 64, "stream": S, "h": H, "b": B},
        scratch=scratch,
        interpret=interpret,
        streams=streams,
        inputs=len(operands),
        split=split,
        reverse=reverse,
        stages=stages,
    )(*operands, gates, initial, *((prefix,) if paired else ()))


def _scan_body(
    *refs: Ref,
    streams: tuple[Stream, ...],
    inputs: int,
    split: bool,
    reverse: bool,
    stages: int,
    wg: Warpgroup,
    x_s: Ref,
    gates_s: Ref,
    left_s: Ref,
    out_s: Ref,
    state_s: Ref,
    bars: list[Ref],
    bar: Ref,
    prefix_s: Ref = None,
    row_s: Ref = None,
) -> None:
    operands, (gates_g, initial_g, *rest) = refs[:inputs], refs[inputs:]
    paired = prefix_s is not None
    prefix_g: Ref
    products_g: Ref
    prefix_g, out_g, last_g, products_g = rest if paired else (None, *rest, None)
    half, b, h = lax.axis_index("half"), lax.axis_index("b"), lax.axis_index("h")
    H, n = gates_g.shape[1:3]
    mine = pl.ds(half * 64, 64)  # this CTA's rows of the state
    parts = 2 if split else 1

    def run(number: int, stream: Stream, bars: Ref) -> None:
        def chunk(i):
            return n - 1 - i if reverse else i

        def load(i):
            c, slot = chunk(i), lax.rem(i, stages)
            bar = bars.at[slot]
            for place, operand in enumerate(stream.operands):
                x_g = operands[operand]
                head = h // (H // x_g.shape[2])
                x_g = x_g.at[b, pl.ds(c * C, C), head]
                plgpu.copy_gmem_to_smem(x_g, x_s.at[slot, place], bar)
            plgpu.copy_gmem_to_smem(gates_g.at[b, h, c], gates_s.at[slot], bar)
            if paired:
                plgpu.copy_gmem_to_smem(prefix_g.at[number, b, h, c, mine], prefix_s.at[slot], bar)

        for i in range(min(stages - 1, n)):
            load(jnp.int32(i))
        plgpu.copy_gmem_to_smem(initial_g.at[number, b, h, mine], state_s, bar)
        plgpu.barrier_wait(bar)

        def step(i, state):
            slot, out = lax.rem(i, stages), lax.rem(i, 2)
            # out_s[out] was copied two steps ago.
            plgpu.wait_smem_to_gmem(2 if paired else 1, wait_read_only=True)
            out_s[out] = state.astype(bf16)
            plgpu.barrier_wait(bars.at[slot])
            for place, (a, _, weight) in enumerate(stream.pairs):
                left = matrix(x_s.at[slot, a, :, mine])
                left *= along_rows(vector(gates_s.at[slot, weight]), 64)
                for part in range(parts):
                    rounded = left.astype(bf16)
                    left_s[parts * place + part] = rounded
                    left -= rounded.astype(f32)
            state = state * gates_s[slot, stream.keep, C - 1]
            if paired:
                given = matrix(prefix_s.at[slot])
                row_s[out] = jnp.sum(state * given, axis=1)
                if stream.coef is not None:
                    state += gates_s[slot, stream.coef, 0] * given
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[out], out_g.at[number, b, h, chunk(i), mine])
            if paired:
                plgpu.copy_smem_to_gmem(row_s.at[out], products_g.at[number, b, h, chunk(i), mine])

            @pl.when(i + stages - 1 < n)
            def load_next():  # into the slot of the chunk before this one, whose products are done
                load(i + stages - 1)

            def add(acc):
                for i in range(parts * len(stream.pairs)):
                    right = x_s.at[slot, stream.pairs[i // parts][1]]
                    plgpu.wgmma(acc, transposed(left_s.at[i]), right)

            return wg.accumulate(state, add)

        state = lax.fori_loop(0, n, step, plgpu.load(state_s, layout=plgpu.Layout.WGMMA))
        state_s[...] = state
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s, last_g.at[number, b, h, mine])
        plgpu.wait_smem_to_gmem(0)

    for number, stream in enumerate(streams):
        pl.when(lax.axis_index("stream") == number)(partial(run, number, stream, bars[number]))


# -- inside a chunk -------------------------------------------------------------------------------


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


def _decay(gates: Ref, cum: int, transpose: bool = False) -> jax.Array:
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


def _invert(f: jax.Array) -> jax.Array:
    """1 / f, 0 where f is 0 (every key was zero)."""
    return jnp.where(f > 0.0, 1.0 / jnp.where(f > 0.0, f, 1.0), 0.0)


def _chebyshev(
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
                s = plgpu.wgmma_accumulator_load(scores, wait_n=1) if wg.registers else scores[...]
                plgpu.wgmma(acc, wg.operand(s * (matrix(m_s) * -ws), rooms[1]), k_s)

            return wg.accumulate(begin, add)

        d = pl.run_scoped(products, accumulator((C, C)))
        return z + d, d, w

    z = right(jnp.float32(step))
    return lax.fori_loop(0, num_iter, iterate, (z, z, jnp.float32(2.0)))[0]


def _rooms(D: int, interpret: bool) -> dict[str, Any]:
    """Shared memory for left operands, where they do not come from registers."""
    room = {"wide_s": tile((C, D)), "wide2_s": tile((C, D)), "square_s": tile((C, C))}
    return room if interpret else {}


# -- forward --------------------------------------------------------------------------------------


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
        | _rooms(D, interpret),
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

    m = _decay(gates, CUM_KK)
    f = _norm(wg, k_s, state_s, gates, m, row)
    inverse = _invert(f)
    z = _chebyshev(
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
    scores = wg.operand(scores * _decay(gates, CUM) * beta2, square_s)
    o = wg.accumulate(read, lambda acc: plgpu.wgmma(acc, scores, v_s))
    q_s[...] = (o * scale).astype(bf16)
    if saved:
        v_s[...] = x.astype(bf16)
        row[...] = f
    also = [(v_s, saved[0].at[b, t, h]), (row, saved[1].at[b, h, c])] if saved else []
    store((q_s, o_g.at[b, t, h]), *also)


# -- backward -------------------------------------------------------------------------------------


def solve_backward(
    do: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    x: jax.Array,
    f: jax.Array,
    states: jax.Array,
    gates: jax.Array,
    num_iter: jax.Array,
    *,
    ridge: float,
    scale: float,
    bp_lambda: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q and alpha, and what those of k, v and g need.

    Readout: dq~_i = scale (a_i U do_i + sum_j M_ij beta_j^2 (do_i . v_j) k_j). The solve is
    differentiated implicitly: y = (H + lambda I)^-1 (alpha dq~), by the same iteration.

    Args: as `solve`; do [B, T, H, D] bfloat16, x and f from it.

    Returns:
      dq, y, q~ [B, T, H, D] bfloat16, and float32 [B, H, n, STEP_ROWS, C]: the gradient of alpha
      (D_ALPHA), mu = ridge y.x / f (MU; 0 without bp_lambda), q~ . dq~ (QDQ) and -y^T H x - mu f^2
      (DH), the shares of U and H in the gradient of the sums of g, and the weights of k_l k_l^T in
      -2 sum_t a_t mu_t H_t (GRAM).
    """
    B, T, H, D = q.shape
    like_q = jax.ShapeDtypeStruct(q.shape, bf16)
    n = gates.shape[2]
    return kernel(
        _solve_backward_body,
        out=(like_q, like_q, like_q, jax.ShapeDtypeStruct((B, H, n, STEP_ROWS, C), f32)),
        grid={"c": n, "h": H, "b": B},
        scratch={
            "do_s": tile((C, D)),
            "k_s": tile((C, D)),
            "v_s": tile((C, D)),
            "x_s": tile((C, D)),
            "state_s": tile((D, D)),
            "m_s": tile((C, C), f32),
            "gates": plgpu.SMEM((ROWS, C), f32),
            "f_s": plgpu.SMEM((C,), f32),
            "rows_s": plgpu.SMEM((STEP_ROWS, C), f32),
            "first": plgpu.Barrier(num_arrivals=5),
            "second": plgpu.Barrier(num_arrivals=3),
            "third": plgpu.Barrier(),
        }
        | _rooms(D, interpret),
        interpret=interpret,
        ridge=ridge,
        scale=scale,
        bp_lambda=bp_lambda,
    )(do, q, k, v, x, f, states, gates, num_iter)


def _solve_backward_body(
    do_g, q_g, k_g, v_g, x_g, f_g, states_g, gates_g, num_iter_g, dq_g, y_g, blend_g, rows_g, *,
    ridge: float, scale: float, bp_lambda: bool, wg: Warpgroup,
    do_s, k_s, v_s, x_s, state_s, m_s, gates, f_s, rows_s, first, second, third,
    wide_s=None, wide2_s=None, square_s=None,
) -> None:  # fmt: skip
    c, h, b = lax.axis_index("c"), lax.axis_index("h"), lax.axis_index("b")
    t, kv, D = pl.ds(c * C, C), h // (q_g.shape[2] // k_g.shape[2]), q_g.shape[3]
    plgpu.copy_gmem_to_smem(gates_g.at[b, h, c], gates, first)
    plgpu.copy_gmem_to_smem(do_g.at[b, t, h], do_s, first)
    plgpu.copy_gmem_to_smem(v_g.at[b, t, kv], v_s, first)
    plgpu.copy_gmem_to_smem(states_g.at[1, b, h, c], state_s, first)
    plgpu.copy_gmem_to_smem(k_g.at[b, t, kv], k_s, first)
    plgpu.copy_gmem_to_smem(x_g.at[b, t, h], x_s, second)
    plgpu.copy_gmem_to_smem(f_g.at[b, h, c], f_s, second)
    plgpu.barrier_wait(first)

    beta2 = along_columns(vector(gates.at[BETA2], COLUMNS), C)
    alpha, start = vector(gates.at[ALPHA]), vector(gates.at[START])
    keys_t = transposed(k_s)
    pairs = wg.matmul((C, C), (do_s, transposed(v_s))) * _decay(gates, CUM) * beta2
    plgpu.copy_gmem_to_smem(q_g.at[b, t, h], v_s, second)
    read = wg.matmul((C, D), (do_s, transposed(state_s))) * along_rows(start, D)
    scores = wg.operand(pairs, square_s)
    dq = scale * wg.accumulate(read, lambda acc: plgpu.wgmma(acc, scores, k_s))
    plgpu.barrier_wait(second)
    # q~ . dq~ without rounding, since sums over tokens will cancel.
    q, x = matrix(v_s), matrix(x_s)
    blend = wg.operand(q + along_rows(alpha, D) * (x - q), wide_s)
    qdq = jnp.sum(pairs * wg.matmul((C, C), (blend, keys_t)), axis=1)
    read = jnp.sum(wg.matmul((C, D), (blend, state_s)) * matrix(do_s), axis=1)
    rows_s[QDQ] = scale * (qdq + start * read)
    rows_s[D_ALPHA] = jnp.sum(dq * (x - q), axis=1)
    plgpu.copy_gmem_to_smem(states_g.at[0, b, h, c], state_s, third)
    do_s[...] = dq.astype(bf16)
    plgpu.commit_smem()
    plgpu.barrier_wait(third)

    f = vector(f_s)
    m = _decay(gates, CUM_KK)
    inverse = _invert(f)
    y = _chebyshev(
        wg, do_s, alpha, k_s, state_s, gates, m, inverse, num_iter_g[b], ridge, m_s,
        (wide_s, square_s),
    ) * along_rows(inverse, D)  # fmt: skip
    dq = (1.0 - along_rows(alpha, D)) * matrix(do_s) + y

    # y^T H x of the rounded x and y that the other kernels see; m_s holds M beta^2 / f.
    rounded = wg.operand(y, wide_s)
    y = y.astype(bf16).astype(f32)
    scores = matrix(m_s) * wg.matmul((C, C), (x_s, keys_t)) * wg.matmul((C, C), (rounded, keys_t))
    read = jnp.sum(y * wg.matmul((C, D), (x_s, state_s)), axis=1)
    yhx = f * jnp.sum(scores, axis=1) + vector(gates.at[START_KK]) * read
    q, x = matrix(v_s), matrix(x_s)
    mu = (ridge if bp_lambda else 0.0) * jnp.sum(y * x, axis=1) * inverse
    rows_s[DH] = -yhx - mu * f * f
    rows_s[MU] = mu
    plgpu.commit_smem()
    weight = vector(rows_s.at[MU], COLUMNS) * vector(gates.at[START_KK], COLUMNS)
    weight = jnp.sum(_decay(gates, CUM_KK, transpose=True) * along_columns(weight, C), axis=1)
    rows_s[GRAM] = -2.0 * vector(gates.at[BETA2]) * weight
    q = q + along_rows(alpha, D) * (x - q)
    x_s[...] = y.astype(bf16)
    v_s[...] = q.astype(bf16)
    do_s[...] = dq.astype(bf16)
    store(
        (do_s, dq_g.at[b, t, h]),
        (x_s, y_g.at[b, t, h]),
        (v_s, blend_g.at[b, t, h]),
        (rows_s, rows_g.at[b, h, c]),
    )


def read_backward(
    q: jax.Array,
    do: jax.Array,
    k: jax.Array,
    v: jax.Array,
    suffix: jax.Array,
    gates: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of k and v through the readout, with b_j the decay of token j to the chunk's end:

        A_k,j = scale sum_{i>=j} M_ij (do_i . v_j) q~_i + b_j W v_j
        A_v,j = scale sum_{i>=j} M_ij (q~_i . k_j) do_i + b_j W^T k_j

    Args:
      q: blended queries q~; suffix: W, bfloat16 [2, B, H, n, D, D] at [1], of `REVERSE`.

    Returns:
      beta^2 A_k, beta^2 A_v [B, T, H, D] bfloat16; the two terms of beta^2 k . A_k, which is also
      beta^2 v . A_v: inside the chunk (INSIDE), later (LATER), float32 [B, H, n, 2, C].
    """
    B, T, H, D = q.shape
    like_q = jax.ShapeDtypeStruct(q.shape, bf16)
    n = gates.shape[2]
    return kernel(
        _read_backward_body,
        out=(like_q, like_q, jax.ShapeDtypeStruct((B, H, n, 2, C), f32)),
        grid={"c": n, "h": H, "b": B},
        scratch={
            "q_s": tile((C, D)),
            "do_s": tile((C, D)),
            "k_s": tile((C, D)),
            "v_s": tile((C, D)),
            "state_s": tile((D, D)),
            "gates": plgpu.SMEM((ROWS, C), f32),
            "rows_s": plgpu.SMEM((2, C), f32),
            "loaded": plgpu.Barrier(num_arrivals=6),
        }
        | _rooms(D, interpret),
        interpret=interpret,
        scale=scale,
    )(q, do, k, v, suffix, gates)


def _read_backward_body(
    q_g, do_g, k_g, v_g, suffix_g, gates_g, dk_g, dv_g, kdk_g, *,
    scale: float, wg: Warpgroup,
    q_s, do_s, k_s, v_s, state_s, gates, rows_s, loaded,
    wide_s=None, wide2_s=None, square_s=None,
) -> None:  # fmt: skip
    c, h, b = lax.axis_index("c"), lax.axis_index("h"), lax.axis_index("b")
    t, kv, D = pl.ds(c * C, C), h // (q_g.shape[2] // k_g.shape[2]), q_g.shape[3]
    plgpu.copy_gmem_to_smem(gates_g.at[b, h, c], gates, loaded)
    plgpu.copy_gmem_to_smem(q_g.at[b, t, h], q_s, loaded)
    plgpu.copy_gmem_to_smem(do_g.at[b, t, h], do_s, loaded)
    plgpu.copy_gmem_to_smem(k_g.at[b, t, kv], k_s, loaded)
    plgpu.copy_gmem_to_smem(v_g.at[b, t, kv], v_s, loaded)
    plgpu.copy_gmem_to_smem(suffix_g.at[1, b, h, c], state_s, loaded)
    plgpu.barrier_wait(loaded)

    beta2, tail = vector(gates.at[BETA2]), vector(gates.at[TAIL])  # b_j beta_j^2
    m = scale * _decay(gates, CUM, transpose=True) * along_rows(beta2, C)
    of_k = wg.matmul((C, C), (k_s, transposed(q_s)))
    of_v = wg.matmul((C, C), (v_s, transposed(do_s)))
    rows_s[INSIDE] = jnp.sum(m * of_k * of_v, axis=1)
    from_state = wg.matmul((C, D), (k_s, state_s))
    rows_s[LATER] = tail * jnp.sum(from_state * matrix(v_s), axis=1)
    scores = wg.operand(m * of_k, square_s)
    dv = wg.accumulate(from_state * along_rows(tail, D), lambda acc: plgpu.wgmma(acc, scores, do_s))
    from_state = wg.matmul((C, D), (v_s, transposed(state_s))) * along_rows(tail, D)
    scores = wg.operand(m * of_v, square_s)
    dk = wg.accumulate(from_state, lambda acc: plgpu.wgmma(acc, scores, q_s))
    q_s[...] = dk.astype(bf16)
    do_s[...] = dv.astype(bf16)
    store((q_s, dk_g.at[b, t, h]), (do_s, dv_g.at[b, t, h]), (rows_s, kdk_g.at[b, h, c]))


def gram_backward(
    x: jax.Array,
    y: jax.Array,
    k: jax.Array,
    dk: jax.Array,
    kdk: jax.Array,
    states: jax.Array,
    suffix: jax.Array,
    gates: jax.Array,
    rows: jax.Array,
    *,
    decay_kk: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of k through H, added to `dk`: with D_t = -y_t x_t^T - mu_t H_t,

        A_j = sum_{t>=j} M_tj (D_t + D_t^T) k_j + b_j Z k_j

    Args:
      dk, kdk: of `read_backward`; rows: of `solve_backward`.
      states: S at [0]; suffix: Z at [0], both bfloat16 [2, B, H, n, D, D].

    Returns:
      dk + beta^2 A [B, T, H, D] bfloat16; float32 [B, H, n, 2, C]: the gradient of g but for reads
      after the chunk of what was written before it (D_G), the gradient of |beta| (D_BETA).
    """
    B, T, H, D = x.shape
    n = gates.shape[2]
    return kernel(
        _gram_backward_body,
        out=(jax.ShapeDtypeStruct(x.shape, bf16), jax.ShapeDtypeStruct((B, H, n, 2, C), f32)),
        grid={"c": n, "h": H, "b": B},
        scratch={
            "x_s": tile((C, D)),
            "y_s": tile((C, D)),
            "k_s": tile((C, D)),
            "m_s": tile((C, C)),
            "state_s": tile((D, D)),
            "gates": plgpu.SMEM((ROWS, C), f32),
            "rows_s": plgpu.SMEM((STEP_ROWS, C), f32),
            "kdk_s": plgpu.SMEM((2, C), f32),
            "out_s": plgpu.SMEM((2, C), f32),
            "first": plgpu.Barrier(num_arrivals=7),
            "second": plgpu.Barrier(num_arrivals=2),
        }
        | _rooms(D, interpret),
        interpret=interpret,
        decay_kk=decay_kk,
    )(x, y, k, dk, kdk, states, suffix, gates, rows)


def _gram_backward_body(
    x_g, y_g, k_g, dk_in_g, kdk_g, states_g, suffix_g, gates_g, rows_g, dk_g, out_g, *,
    decay_kk: bool, wg: Warpgroup,
    x_s, y_s, k_s, m_s, state_s, gates, rows_s, kdk_s, out_s, first, second,
    wide_s=None, wide2_s=None, square_s=None,
) -> None:  # fmt: skip
    c, h, b = lax.axis_index("c"), lax.axis_index("h"), lax.axis_index("b")
    t, kv, D = pl.ds(c * C, C), h // (x_g.shape[2] // k_g.shape[2]), x_g.shape[3]
    plgpu.copy_gmem_to_smem(gates_g.at[b, h, c], gates, first)
    plgpu.copy_gmem_to_smem(rows_g.at[b, h, c], rows_s, first)
    plgpu.copy_gmem_to_smem(kdk_g.at[b, h, c], kdk_s, first)
    plgpu.copy_gmem_to_smem(x_g.at[b, t, h], x_s, first)
    plgpu.copy_gmem_to_smem(y_g.at[b, t, h], y_s, first)
    plgpu.copy_gmem_to_smem(k_g.at[b, t, kv], k_s, first)
    plgpu.copy_gmem_to_smem(states_g.at[0, b, h, c], state_s, first)
    plgpu.barrier_wait(first)

    # -2 sum_t M_tj mu_t (a_t S + sum_l M_tl beta_l^2 k_l k_l^T) k_j; k . A alongside.
    keys_t = transposed(k_s)
    beta2_l = along_columns(vector(gates.at[BETA2], COLUMNS), C)
    m_s[...] = _decay(gates, CUM_KK).astype(bf16)
    m = _decay(gates, CUM_KK, transpose=True)
    weighted = m * along_columns(vector(rows_s.at[MU], COLUMNS), C)
    plgpu.commit_smem()
    pairs = wg.matmul((C, C), (wg.operand(weighted, square_s), m_s))
    gram = wg.matmul((C, C), (k_s, keys_t))
    scores = -2.0 * pairs * gram * beta2_l
    from_state = jnp.sum(weighted * along_columns(vector(gates.at[START_KK], COLUMNS), C), axis=1)
    a = wg.matmul((C, D), (k_s, state_s)) * along_rows(-2.0 * from_state, D)
    plgpu.copy_gmem_to_smem(suffix_g.at[0, b, h, c], state_s, second)
    kdk = jnp.sum(scores * gram, axis=1) + jnp.sum(a * matrix(k_s), axis=1)

    # -sum_t M_tj (y_t x_t^T + x_t y_t^T) k_j
    of_x = wg.matmul((C, C), (k_s, transposed(x_s)))
    of_y = wg.matmul((C, C), (k_s, transposed(y_s)))
    kdk -= 2.0 * jnp.sum(m * of_x * of_y, axis=1)
    for part, right_s in ((scores, k_s), (-1.0 * m * of_x, y_s), (-1.0 * m * of_y, x_s)):
        left = wg.operand(part, square_s)
        a = wg.accumulate(a, lambda acc, left=left, right=right_s: plgpu.wgmma(acc, left, right))
    plgpu.copy_gmem_to_smem(dk_in_g.at[b, t, h], x_s, second)

    # b_j Z k_j, where b_j beta_j^2 = TAIL_KK
    beta2 = vector(gates.at[BETA2])
    tail = vector(gates.at[TAIL_KK])
    plgpu.barrier_wait(second)
    suffix = wg.matmul((C, D), (k_s, state_s))
    kdk, later = beta2 * kdk, tail * jnp.sum(suffix * matrix(k_s), axis=1)
    a = along_rows(beta2, D) * a + along_rows(tail, D) * suffix
    y_s[...] = (matrix(x_s) + a).astype(bf16)

    # g_s decays what tokens j < s wrote for reads i >= s. Sums over i >= s of (reads of i - reads
    # of writes of i) are the part with both inside; writes of j < s read later come on top.
    read, read_later = vector(kdk_s.at[INSIDE]), vector(kdk_s.at[LATER])
    out_s[D_BETA] = (2.0 * (read + read_later) + kdk + later) * _invert(jnp.sqrt(beta2))
    both = vector(rows_s.at[QDQ]) - read
    if decay_kk:
        both += vector(rows_s.at[DH]) - 0.5 * kdk
        read_later += 0.5 * later
    kdk_s[INSIDE] = both
    kdk_s[LATER] = read_later
    plgpu.commit_smem()
    both = along_columns(vector(kdk_s.at[INSIDE], COLUMNS), C)
    later = along_columns(vector(kdk_s.at[LATER], COLUMNS), C)
    out_s[D_G] = jnp.sum(jnp.where(iota(C, 1) >= iota(C, 0), both, later), axis=1)
    store((y_s, dk_g.at[b, t, h]), (out_s, out_g.at[b, h, c]))


# -- the operator ---------------------------------------------------------------------------------


def gka_mosaic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    num_iter: jax.Array | np.ndarray,
    segment_ids: jax.Array | None,
    h_kk: jax.Array,
    h_kv: jax.Array,
    *,
    ridge: float,
    scale: float,
    decay_kk: bool,
    bp_lambda: bool,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """See `pallas_kernels.gka.gka`: same shapes, everything given, zeros at padding, num_iter [B].

    q, k, v bfloat16 with D = 64 or 128, states float32. Gradients are implicit, as in chunked.py.

    Raises:
      ValueError: other dtypes or head dims.
    """
    if reason := _unsupported(q, k, v, h_kk, h_kv):
        raise ValueError(f"gka_mosaic: {reason}.")
    T = q.shape[1]
    doc = jnp.zeros(q.shape[:2], jnp.int32)
    if segment_ids is not None:
        doc = documents(segment_ids)[0]
    if pad := -T % C:  # tokens of zeros neither write nor decay
        wide = [(0, 0), (0, pad)]
        q, k, v = (jnp.pad(a, [*wide, (0, 0), (0, 0)]) for a in (q, k, v))
        alpha, g, beta = (jnp.pad(a, [*wide, (0, 0)]) for a in (alpha, g, beta))
        doc = jnp.pad(doc, wide, mode="edge")
    options = _Options(ridge, scale, decay_kk, bp_lambda, interpret)
    num_iter = jnp.asarray(num_iter)
    o, states = _gka(options, q, k, v, alpha, g, beta, num_iter, doc, h_kk, h_kv)
    return o[:, :T], states


def why_not(
    q: jax.Array, k: jax.Array, v: jax.Array, h_kk: jax.Array, h_kv: jax.Array, solver: str
) -> str | None:
    """Why the kernels cannot run these arguments on this machine; None if they can."""
    if solver != "chebyshev":
        return f"its kernels have the Chebyshev solver, not {solver!r}"
    return why_no_hopper() or _unsupported(q, k, v, h_kk, h_kv)


def _unsupported(q, k, v, h_kk, h_kv) -> str | None:
    if q.shape[-1] not in (64, 128):
        return f"its kernels take head_dim 64 and 128, got {q.shape[-1]}"
    if any(jnp.dtype(x.dtype) != bf16 for x in (q, k, v)):
        return f"its kernels take bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if any(jnp.dtype(x.dtype) != f32 for x in (h_kk, h_kv)):
        return f"its kernels keep float32 states, got {h_kk.dtype}, {h_kv.dtype}"
    return None


@dataclasses.dataclass(frozen=True)
class _Options:
    ridge: float
    scale: float
    decay_kk: bool
    bp_lambda: bool
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gka(options, q, k, v, alpha, g, beta, num_iter, doc, h_kk, h_kv):
    args = (q, k, v, alpha, g, beta, num_iter, doc, h_kk, h_kv)
    return _run_forward(options, *args, save=False)[0]


def _forward(options, *args):
    result, saved = _run_forward(options, *args, save=True)
    return result, (*args, *saved)


def _run_forward(o: _Options, q, k, v, alpha, g, beta, num_iter, doc, h_kk, h_kv, *, save: bool):
    gates = _gates(alpha, g, beta, num_iter, doc, o.decay_kk)
    states, last = scan(
        FORWARD, (k, v), gates, jnp.stack([h_kk, h_kv]), split=True, interpret=o.interpret
    )
    out, *saved = solve(
        q, k, v, states, gates, num_iter,
        ridge=o.ridge, scale=o.scale, save=save, interpret=o.interpret,
    )  # fmt: skip
    return (out, (last[0], last[1])), saved


def _backward(o: _Options, saved, cotangents):
    q, k, v, alpha, g, beta, num_iter, doc, h_kk, h_kv, x, f = saved
    do, (dh_kk, dh_kv) = cotangents
    gates = _gates(alpha, g, beta, num_iter, doc, o.decay_kk)
    initial = jnp.stack([h_kk, h_kv])
    states, _ = scan(FORWARD, (k, v), gates, initial, split=True, interpret=o.interpret)
    dq, y, blend, rows = solve_backward(
        do, q, k, v, x, f, states, gates, num_iter,
        ridge=o.ridge, scale=o.scale, bp_lambda=o.bp_lambda, interpret=o.interpret,
    )  # fmt: skip

    start, mu, read = gates[..., START_KK, :], rows[..., MU, :], gates[..., START, :]
    coef = jnp.broadcast_to(-2 * jnp.sum(start * start * mu, -1, keepdims=True), mu.shape)
    weights = (o.scale * read, read, -start, start, rows[..., GRAM, :], coef)
    suffix, first, products = scan(
        REVERSE,
        (blend, do, x, y, k),
        jnp.stack(weights, axis=3),
        jnp.stack([dh_kk + jnp.swapaxes(dh_kk, -1, -2), dh_kv]),
        states,
        reverse=True,
        stages=2,
        interpret=o.interpret,
    )
    dk, dv, kdk = read_backward(
        blend, do, k, v, suffix, gates, scale=o.scale, interpret=o.interpret
    )
    dk, steps = gram_backward(
        x, y, k, dk, kdk, states, suffix, gates, rows, decay_kk=o.decay_kk, interpret=o.interpret
    )

    # Reads after a chunk of what was written before it: <suffix, state>, half for the symmetric Z.
    across = jnp.sum(products[1], -1) + (jnp.sum(products[0], -1) / 2 if o.decay_kk else 0)
    d_g = steps[..., D_G, :] + across[..., None]
    d_alpha = jnp.where((num_iter > 0)[:, None, None, None], rows[..., D_ALPHA, :], 0)

    def shared(d, like):  # sum over the query heads of a key/value head
        B, T, K, D = like.shape
        return jnp.sum(d.reshape(B, T, K, -1, D), axis=3, dtype=f32).astype(like.dtype)

    return (
        dq,
        shared(dk, k),
        shared(dv, v),
        _join(d_alpha, alpha),
        _join(d_g, g),
        _join(steps[..., D_BETA, :], beta) * jnp.sign(beta),
        None,
        None,
        first[0] / 2,
        first[1],
    )


_gka.defvjp(_forward, _backward)


def _split(x: jax.Array) -> jax.Array:
    """[B, T, H] -> [B, H, n, C]"""
    B, T, H = x.shape
    return jnp.moveaxis(x.reshape(B, T // C, C, H), 3, 1)


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
    """[B, H, n, C] -> [B, T, H], dtype of `like`"""
    return jnp.moveaxis(x, 1, 3).reshape(like.shape).astype(like.dtype)


def _gates(
    alpha: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    num_iter: jax.Array,
    doc: jax.Array,
    decay_kk: bool,
) -> jax.Array:
    """Everything per token that kernels need, float32 [B, H, n, ROWS, C], from [B, T, H]."""
    beta2 = jnp.square(_split(beta.astype(f32)))
    doc = doc.reshape(doc.shape[0], 1, -1, C)
    before = jnp.concatenate([jnp.zeros_like(doc[:, :, :1, -1:]), doc[:, :, :-1, -1:]], axis=2)

    def decays(g):
        """Sums of g inside chunks; weights from a chunk's start, and to its end."""
        # exp(-100) is 0 in float32; a larger sum would cost the digits of all differences.
        total = jnp.cumsum(jnp.maximum(_split(g.astype(f32)), -100.0), axis=-1)
        start = jnp.where(doc == before, jnp.exp(total), 0)
        tail = jnp.where(doc == doc[..., -1:], jnp.exp(total[..., -1:] - total), 0)
        return total, start, tail * beta2

    decayed = decays(g)
    kk = decayed if decay_kk else decays(jnp.zeros_like(g))
    alpha = jnp.where((num_iter > 0)[:, None, None], alpha.astype(f32), 0)
    rows = (*kk, *decayed, beta2, _split(alpha), jnp.broadcast_to(doc.astype(f32), beta2.shape))
    return jnp.stack(rows, axis=3)
