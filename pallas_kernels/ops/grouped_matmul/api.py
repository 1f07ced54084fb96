"""Products of rows with matrices, in groups: each row with the matrix of its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import resolve
from hmf_jax.pallas_kernels.ops.grouped_matmul import mosaic
from hmf_jax.pallas_kernels.ops.grouped_matmul.chunked import grouped_matmul_chunked
from hmf_jax.pallas_kernels.ops.grouped_matmul.reference import grouped_matmul_reference
from hmf_jax.pallas_kernels.ops.grouped_matmul.xla import grouped_matmul_xla, why_not_xla
from hmf_jax.pallas_kernels.recurrent import check

__all__ = ["grouped_matmul"]

_IMPLS = {
    "mosaic": mosaic.grouped_matmul_mosaic,
    "xla": grouped_matmul_xla,
    "chunked": grouped_matmul_chunked,
    "reference": grouped_matmul_reference,
}


def grouped_matmul(
    x: jax.Array, weights: jax.Array, sizes: jax.Array, *, impl: str = "auto"
) -> jax.Array:
    """y[m] = x[m] @ weights[g], g the group of row m: the first sizes[0] rows are in group 0, the
    next sizes[1] in group 1, and so on.

    Differentiable in x and weights. Sums are float32 (float64 for float64 inputs), with one cast at
    the end. On a mesh it is called inside `shard_map`, on what one device has.

    Args:
      x: [M, K], any float dtype; rows that belong to no group may hold anything.
      weights: [G, K, N], dtype of x.
      sizes: [G] integers, rows of each group; their sum must be at most M, which nothing checks.
      impl: "auto", "mosaic" (NVIDIA Hopper, bfloat16, K and N divisible by 64), "xla"
        (`jax.lax.ragged_dot`; TPUs, and GPUs up to 256 rows), "chunked" or "reference".

    Returns:
      [M, N], dtype of x; the rows that belong to no group are zero.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    op = "grouped_matmul"
    if x.ndim != 2 or weights.ndim != 3 or 0 in (*x.shape, *weights.shape):
        raise ValueError(
            f"{op}: x, weights have shapes {x.shape}, {weights.shape}, expected [M, K] and "
            "[G, K, N], none of them 0."
        )
    (M, K), (G, _, N) = x.shape, weights.shape
    check(op, "x", x, (M, K), "M, K")
    check(op, "weights", weights, (G, K, N), "G, K, N")
    if x.dtype != weights.dtype:
        raise ValueError(f"{op}: x is {x.dtype}, weights are {weights.dtype}; cast one of them.")
    if sizes.shape != (G,) or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"{op}: sizes is {sizes.dtype}{sizes.shape}, expected integers [{G}].")
    usable = {
        "mosaic": mosaic.why_not(x, weights),
        "xla": why_not_xla(M),
        "chunked": None,
        "reference": None,
    }
    return _IMPLS[resolve(op, impl, usable)](x, weights, sizes.astype(jnp.int32))
