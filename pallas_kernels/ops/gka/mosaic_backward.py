"""Gradients of GKA inside a chunk, on Hopper: see mosaic.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.mosaic import (
    COLUMNS,
    Warpgroup,
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
from hmf_jax.pallas_kernels.ops.gka.mosaic_forward import chebyshev, decay, invert, rooms_for
from hmf_jax.pallas_kernels.ops.gka.mosaic_scan import (
    ALPHA,
    BETA2,
    CUM,
    CUM_KK,
    D_ALPHA,
    D_BETA,
    D_G,
    DH,
    GRAM,
    INSIDE,
    LATER,
    MU,
    QDQ,
    ROWS,
    START,
    START_KK,
    STEP_ROWS,
    TAIL,
    TAIL_KK,
    C,
    bf16,
    f32,
)


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
        | rooms_for(D, interpret),
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
    pairs = wg.matmul((C, C), (do_s, transposed(v_s))) * decay(gates, CUM) * beta2
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
    m = decay(gates, CUM_KK)
    inverse = invert(f)
    y = chebyshev(
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
    weight = jnp.sum(decay(gates, CUM_KK, transpose=True) * along_columns(weight, C), axis=1)
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
        | rooms_for(D, interpret),
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
    m = scale * decay(gates, CUM, transpose=True) * along_rows(beta2, C)
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
        | rooms_for(D, interpret),
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
    m_s[...] = decay(gates, CUM_KK).astype(bf16)
    m = decay(gates, CUM_KK, transpose=True)
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
    out_s[D_BETA] = (2.0 * (read + read_later) + kdk + later) * invert(jnp.sqrt(beta2))
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
