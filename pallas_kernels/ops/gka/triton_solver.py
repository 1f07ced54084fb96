"""GKA's Triton kernels for sequences: states at chunk starts, norms, Chebyshev iterations.

Arrays are local to one device. A chunk is `CHUNK` tokens; i, j index the tokens of one chunk, and
with S the state at the chunk's start

    H_i = start_i S + sum_j M_ij k_j k_j^T
    M_ij = m_ij beta_j^2    m_ij = exp(cum_i - cum_j) for j <= i of the same document, else 0

bfloat16 arrays are multiplied on tensor cores with float32 accumulation, float32 arrays to float32
accuracy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.triton import jit, tl, triton_call

CHUNK = 64


@jit
def _states_kernel(
    k_ptr, u_ptr, cum_ptr, start_ptr, beta_ptr, doc_ptr, initial_ptr, T, states_ptr, final_ptr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """One program: E columns of the state of one head, through all chunks."""
    e = tl.program_id(0) * E + tl.arange(0, E)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    kv_head = h // (H // K)
    chunks = tl.cdiv(T, C)
    tile = d[:, None] * D + e[None, :]
    state = tl.load(initial_ptr + (b * H + h) * D * D + tile)
    for c in range(chunks):
        out = states_ptr + ((b * H + h) * chunks + c) * D * D + tile
        tl.store(out, state.to(states_ptr.dtype.element_ty))
        token = c * C + tl.arange(0, C)
        valid = token < T
        row = b * T + token
        last = b * T + tl.minimum(c * C + C, T) - 1
        k = tl.load(
            k_ptr + (row * K + kv_head)[:, None] * D + d[None, :], mask=valid[:, None], other=0.0
        )
        u = tl.load(
            u_ptr + (row * K + kv_head)[:, None] * D + e[None, :], mask=valid[:, None], other=0.0
        )
        cum = tl.load(cum_ptr + row * H + h, mask=valid, other=0.0)
        beta = tl.load(beta_ptr + row * H + h, mask=valid, other=0.0)
        weight = tl.exp(tl.minimum(tl.load(cum_ptr + last * H + h) - cum, 0.0)) * beta * beta
        if DOCUMENTS:
            same = tl.load(doc_ptr + row, mask=valid, other=-1) == tl.load(doc_ptr + last)
            weight = tl.where(same, weight, 0.0)
        wide = u.to(tl.float32) * weight[:, None]
        part = wide.to(k.dtype)
        state = state * tl.load(start_ptr + last * H + h)
        state = tl.dot(tl.trans(k), part, state, input_precision="tf32x3")
        if k.dtype != tl.float32:  # the digits that rounding took: states live for many tokens
            rest = (wide - part.to(tl.float32)).to(k.dtype)
            state = tl.dot(tl.trans(k), rest, state)
    tl.store(final_ptr + (b * H + h) * D * D + tile, state)


@jit
def _pair(cum_ptr, doc_ptr, head, row, i, valid, DOCUMENTS: tl.constexpr):
    """m_ij of the chunk with these tokens, [C, C]."""
    cum = tl.load(cum_ptr + head, mask=valid, other=0.0)
    same = i[:, None] >= i[None, :]
    if DOCUMENTS:
        doc = tl.load(doc_ptr + row, mask=valid, other=-1)
        same = same & (doc[:, None] == doc[None, :])
    # The minimum changes pairs j > i only, which are dropped; it keeps infinities away.
    return tl.where(same, tl.exp(tl.minimum(cum[:, None] - cum[None, :], 0.0)), 0.0)


@jit
def _norm_kernel(
    k_ptr, cum_ptr, start_ptr, beta_ptr, doc_ptr, states_ptr, T, f_ptr, H: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, C: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """||H_i||_F of one chunk of one head.

    H_i = H^ + beta_i^2 k_i k_i^T with H^ the decayed H_{i-1}, so with p_i = k_i^T H^ k_i
      ||H_i||^2 = ||H^||^2 + beta_i^2 (2 p_i + beta_i^2 |k_i|^4)
                = start_i^2 ||S||^2 + sum_j m_ij^2 beta_j^2 (2 p_j + beta_j^2 |k_j|^4),
    a sum of terms >= 0: nothing cancels.
    """
    c = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, C)
    valid = c * C + i < T
    row = b * T + c * C + i
    head = row * H + h
    k_row = k_ptr + (row * K + h // (H // K))[:, None] * D
    state_ptr = states_ptr + ((b * H + h) * tl.num_programs(0) + c) * D * D
    start = tl.load(start_ptr + head, mask=valid, other=0.0)
    beta = tl.load(beta_ptr + head, mask=valid, other=0.0)
    beta2 = beta * beta
    pair = _pair(cum_ptr, doc_ptr, head, row, i, valid, DOCUMENTS)

    gram = tl.zeros([C, C], tl.float32)
    p = tl.zeros([C], tl.float32)
    k2 = tl.zeros([C], tl.float32)
    square = tl.zeros([E], tl.float32)
    for first in range(0, D, E):  # in slices E and F of the state, not to run out of registers
        e = first + tl.arange(0, E)
        k_e = tl.load(k_row + e[None, :], mask=valid[:, None], other=0.0)
        gram = tl.dot(k_e, tl.trans(k_e), gram, input_precision="tf32x3")
        projected = tl.zeros([C, E], tl.float32)
        for second in range(0, D, F):
            d = second + tl.arange(0, F)
            state = tl.load(state_ptr + d[:, None] * D + e[None, :])
            k_d = tl.load(k_row + d[None, :], mask=valid[:, None], other=0.0)
            projected = tl.dot(k_d, state.to(k_d.dtype), projected, input_precision="tf32x3")
            square += tl.sum(state.to(tl.float32) * state.to(tl.float32), 0)
        p += start * tl.sum(projected * k_e.to(tl.float32), 1)
        k2 += tl.sum(k_e.to(tl.float32) * k_e.to(tl.float32), 1)
    later = i[:, None] > i[None, :]
    p += tl.sum(tl.where(later, pair * beta2[None, :] * gram * gram, 0.0), 1)
    added = beta2 * (2 * p + beta2 * k2 * k2)
    f = tl.sqrt(start * start * tl.sum(square, 0) + tl.sum(pair * pair * added[None, :], 1))
    tl.store(f_ptr + head, f, mask=valid)


@jit
def _solve_kernel(
    rhs_ptr, k_ptr, cum_ptr, start_ptr, beta_ptr, doc_ptr, states_ptr, num_iter_ptr, f_ptr, T,
    x_ptr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    RIDGE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: Chebyshev iteration on H / f for z = f x (`chunked._chebyshev`)."""
    c = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    valid = c * C + i < T
    row = b * T + c * C + i
    head = row * H + h
    first = b * T + c * C
    rhs_ptr += (first * H + h) * D
    x_ptr += (first * H + h) * D
    k_ptr += (first * K + h // (H // K)) * D
    x_tile = i[:, None] * (H * D) + d[None, :]
    state_ptr = states_ptr + ((b * H + h) * tl.num_programs(0) + c) * D * D
    k = tl.load(k_ptr + i[:, None] * (K * D) + d[None, :], mask=valid[:, None], other=0.0)
    state = tl.load(state_ptr + d[:, None] * D + d[None, :]).to(k.dtype)
    beta = tl.load(beta_ptr + head, mask=valid, other=0.0)
    f = tl.load(f_ptr + head, mask=valid, other=0.0)
    inverse = tl.where(f > 0, 1 / tl.where(f > 0, f, 1.0), 0.0)
    start = tl.load(start_ptr + head, mask=valid, other=0.0) * inverse
    pair = _pair(cum_ptr, doc_ptr, head, row, i, valid, DOCUMENTS)
    pair = pair * (beta * beta)[None, :] * inverse[:, None]

    STEP: tl.constexpr = 2 / (1 + 2 * RIDGE)
    CONTRACTION: tl.constexpr = (0.5 / (1 + 2 * RIDGE)) * (0.5 / (1 + 2 * RIDGE))
    rhs = tl.load(rhs_ptr + x_tile, mask=valid[:, None], other=0.0)
    z = STEP * rhs.to(tl.float32)
    z_prev = tl.zeros_like(z)
    omega = 2.0
    for _ in range(tl.load(num_iter_ptr + b)):
        omega = 1 / (1 - CONTRACTION * omega)
        # The residual's factor goes into the operands: both products add to one accumulator. rhs
        # comes from the cache: registers are short.
        factor = -STEP * omega
        rhs = tl.load(rhs_ptr + x_tile, mask=valid[:, None], other=0.0)
        new = (omega + factor * RIDGE) * z - (omega - 1) * z_prev - factor * rhs.to(tl.float32)
        scaled = (z * (factor * start)[:, None]).to(k.dtype)
        new = tl.dot(scaled, state, new, input_precision="ieee")
        score = tl.dot(z.to(k.dtype), tl.trans(k), input_precision="ieee")
        score = (score * (factor * pair)).to(k.dtype)
        new = tl.dot(score, k, new, input_precision="ieee")
        z_prev = z
        z = new
    tl.store(x_ptr + x_tile, (z * inverse[:, None]).to(x_ptr.dtype.element_ty), mask=valid[:, None])


def states(
    k: jax.Array,
    u: jax.Array,
    cum: jax.Array,
    start: jax.Array,
    beta: jax.Array,
    doc: jax.Array | None,
    initial: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Chunk-start states of S_t = exp(g_t) S_{t-1} + beta_t^2 k_t u_t^T, for u = k or v.

    Args:
      k, u: [B, T, K, D] bfloat16 or float32, not scaled by beta; query head e uses e // (H / K).
      cum: [B, T, H] float32, sums of g <= 0 from the start of the chunk or document.
      start: [B, T, H] float32, decay factor from the state at the chunk's start to this token; 0
        for tokens of another document.
      beta: [B, T, H] float32.
      doc: [B, T] int32 document numbers >= 0, or None.
      initial: [B, H, D, D] float32.
      dtype: of the chunk-start states.

    Returns:
      states [B, H, n, D, D] at the starts of the n chunks, and the last state, float32.
    """
    B, T, K, D = k.shape
    H = cum.shape[2]
    n = -(-T // CHUNK)
    columns = min(D, 32)
    return triton_call(
        *(k, u, cum, start, beta, cum if doc is None else doc, initial, T),
        kernel=_states_kernel,
        name="gka_states",
        out_shape=(
            jax.ShapeDtypeStruct((B, H, n, D, D), dtype),
            jax.ShapeDtypeStruct((B, H, D, D), jnp.float32),
        ),
        grid=(D // columns, H, B),
        num_warps=4,
        num_stages=2 if k.dtype == jnp.float32 else 4,
        H=H,
        K=K,
        D=D,
        C=CHUNK,
        E=columns,
        DOCUMENTS=doc is not None,
    )


def solve(
    rhs: jax.Array,
    k: jax.Array,
    cum: jax.Array,
    start: jax.Array,
    beta: jax.Array,
    doc: jax.Array | None,
    states: jax.Array,
    num_iter: jax.Array,
    f: jax.Array | None,
    *,
    ridge: float,
) -> tuple[jax.Array, jax.Array]:
    """x_i ~ (H_i + ridge ||H_i||_F I)^-1 rhs_i by Chebyshev iteration; 0 where H_i is 0.

    Args:
      rhs: [B, T, H, D], dtype of k.
      k, cum, start, beta, doc: as in `states`.
      states: [B, H, n, D, D] chunk-start states of H, bfloat16 or float32.
      num_iter: [B] int32 steps.
      f: [B, T, H] float32 norms ||H_i||_F; None computes them.
      ridge: lambda over the norm, >= 0.

    Returns:
      x [B, T, H, D], dtype of rhs, and f.
    """
    B, T, H, D = rhs.shape
    n = -(-T // CHUNK)
    decays = (cum, start, beta, cum if doc is None else doc)
    tiles = {"H": H, "K": k.shape[2], "D": D, "C": CHUNK, "DOCUMENTS": doc is not None}
    grid = (n, H, B)
    full = k.dtype == jnp.float32
    if f is None:
        norm: jax.Array = triton_call(
            *(k, *decays, states, T),
            kernel=_norm_kernel,
            name="gka_norm",
            out_shape=jax.ShapeDtypeStruct((B, T, H), jnp.float32),
            grid=grid,
            num_warps=4,
            num_stages=1 if full else 2,
            E=32,
            F=32 if full else D,
            **tiles,
        )
    else:
        norm = f
    x = triton_call(
        *(rhs, k, *decays, states, num_iter, norm, T),
        kernel=_solve_kernel,
        name="gka_solve",
        out_shape=jax.ShapeDtypeStruct(rhs.shape, rhs.dtype),
        grid=grid,
        num_warps=16 if full and D == 128 else 4,
        num_stages=3,
        RIDGE=ridge,
        **tiles,
    )
    return x, norm
