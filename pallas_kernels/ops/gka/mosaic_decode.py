"""One token of GKA on NVIDIA Hopper GPUs: a Pallas Mosaic GPU kernel that updates both states.

One warpgroup (128 threads) per (row, head) does the whole step, so that a layer is one launch:

    H <- e^g H + k k^T, stored, and kept in registers (128 floats per thread at head_dim 128)
    f = ||H||_F, then num_iter Chebyshev steps for (H + ridge f I) x = q
    U <- e^g U + k v^T, stored;   o = scale U^T (q + alpha (x - q))

Memory bounds the step: both float32 states are read and written once, 256 KiB per (row, head) at
head_dim 128, by the copy engine (TMA) through shared memory. U arrives and H leaves while the
solver runs, and two blocks share a multiprocessor: one copies while the other iterates.

For H z, a thread holds two rows of H and every other group of four columns (D = 128), a warp whole
rows: z comes from shared memory, a sum over columns takes one shuffle, a step one barrier.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hmf_jax.pallas_kernels.compat import SwizzleTransform, TilingTransform, warpgroup_barrier
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.pallas_kernels.ops.gka.inputs import Options, Result, Token
from hmf_jax.pallas_kernels.ops.gka.step import check_step, with_gradient

__all__ = ["gka_decode", "why_not"]

_INPUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
_HEAD_DIMS = (64, 128)


def why_not(token: Token, solver: str) -> str | None:
    """Why the kernel cannot run these arguments on this machine; None if it can."""
    if solver != "chebyshev":
        return f"its kernel has the Chebyshev solver, not {solver!r}"
    return why_no_hopper() or _unsupported(token)


def _unsupported(token: Token) -> str | None:
    if token.q.shape[-1] not in _HEAD_DIMS:
        dims = " and ".join(map(str, _HEAD_DIMS))
        return f"its kernel takes head_dim {dims}, got {token.q.shape[-1]}"
    if any(jnp.dtype(a.dtype) not in _INPUT_DTYPES for a in (token.q, token.k, token.v)):
        got = ", ".join(sorted({str(a.dtype) for a in (token.q, token.k, token.v)}))
        return f"its kernel takes bfloat16 and float32, got {got}"
    if any(jnp.dtype(a.dtype) != jnp.float32 for a in (token.h_kk, token.h_kv)):
        return f"its kernel keeps float32 states, got {token.h_kk.dtype} and {token.h_kv.dtype}"
    return None


def gka_decode(
    token: Token, options: Options, *, interpret: plgpu.InterpretGPUParams | None = None
) -> Result:
    """One GKA step with Pallas Mosaic GPU; see `pallas_kernels.gka_step` for the equations.

    Under jit with donated states (or states carried by a loop) the states are updated in place.
    The gradient is that of the chunked implementation, computed from the saved inputs; asking for
    it costs a copy of the states.

    Args:
      token: D 64 or 128; q, k, v bfloat16 or float32; alpha, g, beta of any float dtype.
      interpret: runs the kernel in the interpreter, on CPU (inline_mgpu="ignore" is needed).

    Returns:
      o [B, H, D], dtype of v, and (h_kk, h_kv).

    Raises:
      ValueError: shapes, dtypes or a ridge that do not fit.
    """
    check_step(token, options)
    if reason := _unsupported(token):
        raise ValueError(f"gka_decode: {reason}.")
    B, H, D = token.q.shape
    ridge, scale, decay_kk, _ = options
    static = _Static(ridge, scale, decay_kk, _early_rows(B * H, D), interpret)
    return with_gradient(partial(_launch, static), options, token)


class _Static(NamedTuple):
    """What is compiled in. `early`: see `_early_rows`."""

    ridge: float
    scale: float
    decay_kk: bool
    early: int
    interpret: plgpu.InterpretGPUParams | None


def _tiled(tiles, warp_dims, lane_dims):
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=warp_dims, lane_dims=lane_dims, vector_dim=-1
    )


def _layouts(D: int):
    """Where the elements of a state live: threads of (H, U), both arrays [D, D].

    Chosen so that 16-byte accesses of a quarter warp to shared memory (128-byte swizzle) hit
    distinct banks.
    """
    if D == 64:
        h = _tiled(((64, 32), (16, 32), (4, 32), (4,)), (-7,), (-5, -2))
        u = _tiled(((8, 64), (4, 32), (4,)), (-5, -4), (-3, -2))
    else:
        h = _tiled(((128, 8), (32, 8), (2, 8), (4,)), (-7,), (-5, -2))
        u = _tiled(((4, 128), (4, 32), (4,)), (-4,), (-3, -2))
    return h, u


# Under jit, so that the references are internal to one program and alias its buffers.
@partial(jax.jit, static_argnums=0)
def _launch(static: _Static, token: Token) -> Result:
    q, k, v, alpha, g, beta, num_iter, slots, h_kk, h_kv = token
    B, H, _ = q.shape
    kernel: Any = pl.kernel(
        partial(_kernel, static, slots is not None),
        out_type=(jax.ShapeDtypeStruct(q.shape, v.dtype),),
        mesh=plgpu.Mesh(grid=(B, H), grid_names=("row", "head")),
        # warpgroup_barrier takes the place of the automatic barriers.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=static.interpret or False,
        name="gka_decode",
    )
    # A kernel writes to references it is given: that is what makes the update in place.
    h_kk_ref, h_kv_ref = jax.new_ref(h_kk), jax.new_ref(h_kv)
    if slots is None:
        slots = num_iter  # not read
    (o,) = kernel(q, k, v, alpha, g, beta, num_iter, slots, h_kk_ref, h_kv_ref)
    return o, (jax.freeze(h_kk_ref), jax.freeze(h_kv_ref))


def _early_rows(blocks: int, D: int) -> int:
    """Rows of U that are fetched along with H; the others go where H was, once that is stored.

    With half of U two blocks of D = 128 fit on a multiprocessor (132 of them, 228 KiB each), so
    that one copies while the other iterates. No block waits for another when there are few.
    """
    return D // 2 if D == 128 and blocks > 132 else D


def _kernel(static, has_slots, *refs):
    h_kv_ref = refs[9]
    D = h_kv_ref.shape[-1]
    # Tiles whose rows of 128 bytes are permuted (swizzled).
    tiles = (TilingTransform((8, 32)), SwizzleTransform(128))
    pl.run_scoped(
        partial(_row_head, static, has_slots, *refs),
        plgpu.SMEM((2, D), jnp.float32),
        plgpu.SMEM((D,), jnp.float32),
        plgpu.SMEM((D, D), jnp.float32, transforms=tiles),
        plgpu.SMEM((static.early, D), jnp.float32, transforms=tiles),
        plgpu.Barrier(),
        plgpu.Barrier(),
        plgpu.Barrier(),
    )


def _row_head(
    static,
    has_slots,
    q_ref,
    k_ref,
    v_ref,
    alpha_ref,
    g_ref,
    beta_ref,
    num_iter_ref,
    slots_ref,
    h_kk_ref,
    h_kv_ref,
    o_ref,
    x_smem,
    k_smem,
    h_smem,
    u_smem,
    h_here,
    u_early_here,
    u_late_here,
):
    """One (row, head): the whole step. `_smem` are in shared memory, `_ref` in device memory."""
    ridge, scale, decay_kk, early, _ = static
    D, H, K, S = h_kk_ref.shape[-1], q_ref.shape[1], k_ref.shape[1], h_kk_ref.shape[0]
    h_layout, u_layout = _layouts(D)
    row, head = lax.axis_index("row"), lax.axis_index("head")
    slot = slots_ref[row] if has_slots else row

    def vector(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def scalar(ref):
        return ref[row, head].astype(jnp.float32)

    def spread(x, axis, layout, shape):
        """x along `axis` of a matrix of this shape, repeated along the other one."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), layout)

    def outer(x, y, layout):
        shape = (x.shape[0], y.shape[0])
        return spread(x, 0, layout, shape) * spread(y, 1, layout, shape)

    def active():
        plgpu.copy_gmem_to_smem(h_kk_ref.at[slot, head], h_smem, h_here)
        u_ref = h_kv_ref.at[slot, head]
        plgpu.copy_gmem_to_smem(u_ref.at[pl.ds(0, early)], u_smem, u_early_here)

        # Everything else that the token brings, while the states are on their way.
        kv_head = head // (H // K)
        num_iter = num_iter_ref[row]
        alpha = jnp.where(num_iter > 0, scalar(alpha_ref), 0)
        decay, beta = jnp.exp(scalar(g_ref)), scalar(beta_ref)
        along_rows, along_columns = h_layout.reduce(1), h_layout.reduce(0)
        q = vector(q_ref.at[row, head], along_rows)
        k_rows = beta * vector(k_ref.at[row, kv_head], along_rows)
        k_columns = beta * vector(k_ref.at[row, kv_head], along_columns)
        v = beta * vector(v_ref.at[row, kv_head], u_layout.reduce(0))
        k_smem[...] = k_columns

        plgpu.barrier_wait(h_here)
        h = plgpu.load(h_smem, layout=h_layout)
        h = (decay if decay_kk else 1) * h + outer(k_rows, k_columns, h_layout)
        h_smem[...] = h
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(h_smem, h_kk_ref.at[slot, head])
        f2 = jnp.sum(jnp.sum(h * h, axis=1))
        inverse = jnp.where(f2 > 0, lax.rsqrt(f2), 0)
        if early < D:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            late = h_smem.at[pl.ds(0, D - early)]
            plgpu.copy_gmem_to_smem(u_ref.at[pl.ds(early, D - early)], late, u_late_here)

        # Chebyshev on z = f x and H / f, as in `chunked._chebyshev`.
        step = 2 / (1 + 2 * ridge)
        contraction = (0.5 / (1 + 2 * ridge)) ** 2

        def shared(n, x):
            """x for all threads to read. Two buffers in turn: one barrier orders both uses."""
            buffer = x_smem.at[lax.rem(n, 2)]
            buffer[...] = x
            warpgroup_barrier()
            return buffer

        def iterate(n, carry):
            z, z_prev, omega = carry
            omega = lax.rsqrt(1 - contraction * omega)
            omega = omega * omega
            z_columns = plgpu.load(shared(n, z), layout=along_columns)
            hz = jnp.sum(h * spread(z_columns, 1, h_layout, (D, D)), axis=1)
            new = omega * (1 - step * ridge) * z + (1 - omega) * z_prev
            return new + omega * step * (q - inverse * hz), z, omega

        z, _, _ = lax.fori_loop(0, num_iter, iterate, (step * q, 0 * q, jnp.float32(2)))
        x = shared(num_iter, scale * (q + alpha * (inverse * z - q)))

        sums, part, along_keys = 0, D // 4, u_layout.reduce(1)
        for start in range(0, D, part):
            rows = pl.ds(start, part)
            if start in (0, early):
                plgpu.barrier_wait(u_early_here if start == 0 else u_late_here)
            block = u_smem.at[rows] if start < early else h_smem.at[pl.ds(start - early, part)]
            x_part, k_part = (plgpu.load(m.at[rows], layout=along_keys) for m in (x, k_smem))
            u = decay * plgpu.load(block, layout=u_layout) + outer(k_part, v, u_layout)
            block[...] = u
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(block, u_ref.at[rows])
            sums += u * spread(x_part, 0, u_layout, u.shape)
        o_ref[row, head] = jnp.sum(sums, axis=0).astype(o_ref.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def inactive():
        zeros = jnp.zeros((D,), o_ref.dtype)
        o_ref[row, head] = plgpu.layout_cast(zeros, u_layout.reduce(0))

    if has_slots:
        lax.cond((slot >= 0) & (slot < S), active, inactive)
    else:
        active()
