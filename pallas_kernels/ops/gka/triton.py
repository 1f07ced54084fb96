"""Gated KalmaNet for NVIDIA GPUs before Hopper: Triton kernels, called through jax-triton.

`states` is sequential over chunks, `solve` (norms, then Chebyshev iterations) parallel over them;
`decode` is one token in one launch, with its states updated in place. `gka_triton` and `gka_decode`
make differentiable operators of them; blend, readout and what gradients need beyond a second
`solve` are those of chunked.py. Arrays are local to one device. A chunk is `CHUNK` tokens; i, j
index the tokens of one chunk, and with S the state at the chunk's start

    H_i = start_i S + sum_j M_ij k_j k_j^T
    M_ij = m_ij beta_j^2    m_ij = exp(cum_i - cum_j) for j <= i of the same document, else 0

bfloat16 arrays are multiplied on tensor cores with float32 accumulation, float32 arrays to float32
accuracy.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.pallas_kernels.ops.gka import chunked
from hmf_jax.pallas_kernels.ops.gka.step import check_step, with_gradient
from hmf_jax.pallas_kernels.recurrent import from_chunks, to_chunks
from hmf_jax.pallas_kernels.segments import documents

try:  # an optional extra
    import jax_triton  # pyright: ignore[reportMissingImports]
    import triton
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    jit: Any = triton.jit  # pyright: ignore[reportAttributeAccessIssue]
    triton_call: Any = jax_triton.triton_call
    _MISSING = None
except (ImportError, AttributeError) as error:  # missing, or made for another jax
    jit = triton_call = lambda kernel: kernel  # the kernels stay plain functions, never called
    _MISSING = f"jax-triton cannot be imported ({error}; pip install hmf-jax[triton])"

CHUNK = 64
HEAD_DIMS = (32, 64, 128)
SMALL = ("8.6", "8.9", "12.0", "12.1")  # compute capabilities with 99 KiB of memory per block


def _capability() -> str:
    return getattr(jax.devices()[0], "compute_capability", "")


@functools.cache
def _no_device() -> str | None:
    if _MISSING is not None:
        return _MISSING
    try:
        ampere = jax.devices()[0].platform == "gpu" and float(_capability()) >= 8
    except ValueError:  # AMD
        ampere = False
    return None if ampere else "its kernels need an NVIDIA GPU, compute capability 8.0 or newer"


def why_not(
    q: jax.Array, k: jax.Array, v: jax.Array, h_kk: jax.Array, h_kv: jax.Array, solver: str
) -> str | None:
    """Why the kernels cannot run these arguments on this machine; None if they can."""
    if solver != "chebyshev":
        return f"its kernels have the Chebyshev solver, not {solver!r}"
    if _no_device() is not None:
        return _no_device()
    dtypes, head_dim = {jnp.dtype(x.dtype) for x in (q, k, v)}, q.shape[-1]
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"its kernels take bfloat16 or float32, got {', '.join(sorted(map(str, dtypes)))}"
    if any(jnp.dtype(x.dtype) != jnp.float32 for x in (h_kk, h_kv)):
        return f"its kernels keep float32 states, got {h_kk.dtype} and {h_kv.dtype}"
    if head_dim not in HEAD_DIMS:
        return f"its kernels take head dims {HEAD_DIMS}, got {head_dim}"
    if head_dim == 128 and jnp.dtype(jnp.float32) in dtypes and _capability() in SMALL:
        return "its float32 kernel for head dim 128 needs 128 KiB of shared memory"
    return None


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


@jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, alpha_ptr, g_ptr, beta_ptr, num_iter_ptr, slots_ptr, h_kk_ptr, h_kv_ptr,
    o_ptr, new_kk_ptr, new_kv_ptr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, RIDGE: tl.constexpr, SCALE: tl.constexpr, DECAY_KK: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row. The states' inputs and outputs are the same memory."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    head = b * H + h
    slot = tl.load(slots_ptr + b).to(tl.int64)
    if slot < 0:
        tl.store(o_ptr + head * D + d, tl.zeros([D], o_ptr.dtype.element_ty))
    else:
        state = (slot * H + h) * D * D
        # The last term is 0, which the compiler cannot know: instead of four columns in a row it
        # gives every thread whole columns one by one, so that H z needs no sum across threads.
        tile = d[:, None] * D + d[None, :] + tl.minimum(slot, 0)
        h_kk = tl.load(h_kk_ptr + state + tile)
        q = tl.load(q_ptr + head * D + d).to(tl.float32)
        kv = (b * K + h // (H // K)) * D
        beta = tl.load(beta_ptr + head)
        k = tl.load(k_ptr + kv + d).to(tl.float32) * beta
        decay = tl.exp(tl.load(g_ptr + head))
        if DECAY_KK:
            h_kk = h_kk * decay
        h_kk += k[:, None] * k[None, :]
        tl.store(new_kk_ptr + state + tile, h_kk)

        f = tl.sqrt(tl.sum(tl.sum(h_kk * h_kk, 0), 0))
        inverse = tl.where(f > 0, 1 / tl.where(f > 0, f, 1.0), 0.0)
        STEP: tl.constexpr = 2 / (1 + 2 * RIDGE)
        CONTRACTION: tl.constexpr = (0.5 / (1 + 2 * RIDGE)) * (0.5 / (1 + 2 * RIDGE))
        z = STEP * q
        z_prev = tl.zeros_like(z)
        omega = 2.0
        num_iter = tl.load(num_iter_ptr + b)
        for _ in range(num_iter):
            omega = 1 / (1 - CONTRACTION * omega)
            residual = tl.sum(h_kk * z[:, None], 0) * inverse + RIDGE * z - q
            new = omega * (z - STEP * residual) - (omega - 1) * z_prev
            z_prev = z
            z = new
        blend = tl.where(num_iter > 0, q + tl.load(alpha_ptr + head) * (z * inverse - q), q)

        for first in range(0, D, E):  # columns of U in parts: registers are short
            e = first + tl.arange(0, E)
            part = state + d[:, None] * D + e[None, :]
            v = tl.load(v_ptr + kv + e).to(tl.float32) * beta
            h_kv = tl.load(h_kv_ptr + part) * decay + k[:, None] * v[None, :]
            tl.store(new_kv_ptr + part, h_kv)
            o = SCALE * tl.sum(h_kv * blend[:, None], 0)
            tl.store(o_ptr + head * D + e, o.to(o_ptr.dtype.element_ty))


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


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    num_iter: jax.Array,
    slots: jax.Array,
    h_kk: jax.Array,
    h_kv: jax.Array,
    *,
    ridge: float,
    scale: float,
    decay_kk: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One token per row, float32 inside; states are updated in place where they are donated.

    Args:
      q: [B, H, D]; k, v: [B, K, D] not scaled by beta; bfloat16 or float32.
      alpha, g, beta: [B, H] float32.
      num_iter: [B] int32 steps; 0 leaves the query as it is.
      slots: [B] int32, the state that row b reads and updates, each used once; < 0 = inactive row.
      h_kk, h_kv: [S, H, D, D] float32, S >= 1; states of no row keep their content.
      ridge, scale, decay_kk: as in `pallas_kernels.gka`.

    Returns:
      o [B, H, D], dtype of v, 0 for inactive rows; and (h_kk, h_kv).
    """
    B, H, D = q.shape
    o, h_kk, h_kv = triton_call(
        *(q, k, v, alpha, g, beta, num_iter, slots, h_kk, h_kv),
        kernel=_decode_kernel,
        name="gka_decode",
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct(h_kk.shape, h_kk.dtype),
            jax.ShapeDtypeStruct(h_kv.shape, h_kv.dtype),
        ),
        input_output_aliases={8: 1, 9: 2},
        grid=(H, B),
        num_warps=4,
        num_stages=1,
        H=H,
        K=k.shape[1],
        D=D,
        E=32,
        RIDGE=ridge,
        SCALE=scale,
        DECAY_KK=decay_kk,
    )
    return o, (h_kk, h_kv)


def gka_triton(
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
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """See `pallas_kernels.gka`: same shapes, everything given, zeros at padding, num_iter [B].

    Dtypes and head dims as in `why_not`. Gradients are implicit, as in chunked.py.
    """
    T, dtype = q.shape[1], q.dtype
    doc = None if segment_ids is None else documents(segment_ids)[0]
    q, k, v, alpha, g, beta = (x.astype(jnp.float32) for x in (q, k, v, alpha, g, beta))
    g_kk = g if decay_kk else jnp.zeros_like(g)
    num_iter = jnp.asarray(num_iter)
    options = _Options(ridge, bp_lambda, dtype)
    x, h_kk = _solution(options, q, k, g_kk, beta, num_iter, doc, h_kk)
    starts, h_kv = _read_states(options, k, v, g, beta, doc, h_kv)
    q, x, alpha = (to_chunks(a, CHUNK) for a in (q, x, alpha))
    o = chunked.readout(q, x, alpha, num_iter, *_chunks(k, v, g, beta, doc), starts)
    return (scale * from_chunks(o[:, :, :, None], T)).astype(dtype), (h_kk, h_kv)


def gka_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    num_iter: jax.Array,
    slots: jax.Array | None,
    h_kk: jax.Array,
    h_kv: jax.Array,
    *,
    ridge: float,
    scale: float,
    decay_kk: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`decode` as `gka_step` wants it: any float gates, slots that may be None or too large, and
    the gradient of the chunked implementation."""

    def launch(q, k, v, alpha, g, beta, num_iter, slots, h_kk, h_kv):
        S = h_kk.shape[0]
        alpha, g, beta = (x.astype(jnp.float32) for x in (alpha, g, beta))
        slots = jnp.arange(S) if slots is None else jnp.where(slots < S, slots, -1)
        return decode(
            *(q, k, v, alpha, g, beta, num_iter, slots.astype(jnp.int32), h_kk, h_kv),
            ridge=ridge,
            scale=scale,
            decay_kk=decay_kk,
        )

    arrays = (q, k, v, alpha, g, beta, num_iter, slots, h_kk, h_kv)
    check_step(*arrays, ridge)
    return with_gradient(launch, (ridge, scale, decay_kk), *arrays)


class _Options(NamedTuple):
    """`dtype` is what kernels multiply in; float32 arrays around them keep sums of gradients."""

    ridge: float
    bp_lambda: bool
    dtype: Any


def _sums(g: jax.Array, doc: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`cum` and `start` of `states`, from g [B, T, H]."""
    T = g.shape[1]
    g = to_chunks(g, CHUNK)
    # exp(-100) is 0 in float32; a larger sum would cost the digits of all differences.
    cum = jnp.cumsum(jnp.maximum(g, -100), axis=-1)
    start = chunked.chunk_decays(g, doc)[1]
    cum, start = (from_chunks(x[:, :, :, None, :, None], T)[..., 0] for x in (cum, start))
    return cum, start


def _chunks(
    k: jax.Array, u: jax.Array, g: jax.Array, beta: jax.Array, doc: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What chunked.py computes with: scaled k and u of all heads, pair and start, in chunks."""
    k, u = (to_chunks(chunked.scaled(x, beta), CHUNK) for x in (k, u))
    return k, u, *chunked.chunk_decays(to_chunks(g, CHUNK), doc)


def _run_states(options: _Options, k, u, g, beta, doc, initial, dtype):
    k, u = k.astype(options.dtype), u.astype(options.dtype)
    return states(k, u, *_sums(g, doc), beta, doc, initial, dtype=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_states(options, k, u, g, beta, doc, initial):
    """`chunked.chunk_states` of unscaled float32 k and u by the kernel."""
    starts, last = _run_states(options, k, u, g, beta, doc, initial, jnp.float32)
    return jnp.moveaxis(starts, 2, 0), last


def _read_states_forward(options, k, u, g, beta, doc, initial):
    saved = (k.astype(options.dtype), u.astype(options.dtype), g, beta, doc, initial)
    return _read_states(options, k, u, g, beta, doc, initial), saved


def _read_states_backward(options, saved, cotangents):
    k, u, g, beta, doc, initial = saved

    def plain(k, u, g, beta, initial):
        return chunked.chunk_states(*_chunks(k, u, g, beta, doc), initial)

    wide = (k.astype(jnp.float32), u.astype(jnp.float32), g, beta, initial)
    *d_token, d_initial = jax.vjp(plain, *wide)[1](cotangents)
    return *d_token, None, d_initial


_read_states.defvjp(_read_states_forward, _read_states_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solution(options, q, k, g, beta, num_iter, doc, h_kk):
    """x and the last H, from unscaled float32 k; with the implicit gradient of the exact x."""
    return _solution_forward(options, q, k, g, beta, num_iter, doc, h_kk)[0]


def _solution_forward(options, q, k, g, beta, num_iter, doc, h_kk):
    q, low = q.astype(options.dtype), k.astype(options.dtype)
    starts, last = _run_states(options, k, k, g, beta, doc, h_kk, options.dtype)
    decays = (*_sums(g, doc), beta, doc)
    x, f = solve(q, low, *decays, starts, num_iter, None, ridge=options.ridge)
    saved = (low, g, beta, num_iter, doc, h_kk, starts, f, x)
    return (x.astype(jnp.float32), last), saved


def _solution_backward(options, saved, cotangents):
    """As `chunked._solve_backward`; the scan that makes the states is differentiated in jnp."""
    low, g, beta, num_iter, doc, h_kk, starts, f, x = saved
    x_bar, last_bar = cotangents
    decays = (*_sums(g, doc), beta, doc)
    y, _ = solve(x_bar.astype(low.dtype), low, *decays, starts, num_iter, f, ridge=options.ridge)
    y_chunks, x_chunks = (to_chunks(a.astype(jnp.float32), CHUNK) for a in (y, x))

    def loss(k, g, beta, h_kk):
        k, _, pair, start = _chunks(k, k, g, beta, doc)
        starts, last = chunked.chunk_states(k, k, pair, start, h_kk)
        quadratic = chunked.minus_quadratic(
            options.ridge, options.bp_lambda, y_chunks, x_chunks, k, pair, start, starts
        )
        return quadratic + jnp.sum(last * last_bar)

    d_k, d_g, d_beta, d_h = jax.grad(loss, argnums=(0, 1, 2, 3))(
        low.astype(jnp.float32), g, beta, h_kk
    )
    return y.astype(jnp.float32), d_k, d_g, d_beta, None, None, d_h


_solution.defvjp(_solution_forward, _solution_backward)
