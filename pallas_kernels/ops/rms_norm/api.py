"""RMSNorm of hidden states or heads, with what comes right before it or right after."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import sharded
from hmf_jax.pallas_kernels.dispatch import finite, resolve
from hmf_jax.pallas_kernels.ops.rms_norm import mosaic
from hmf_jax.pallas_kernels.ops.rms_norm.chunked import rms_norm_chunked
from hmf_jax.pallas_kernels.ops.rms_norm.inputs import Inputs, Options
from hmf_jax.pallas_kernels.recurrent import check

__all__ = ["rms_norm"]

_IMPLS = {
    "mosaic": mosaic.rms_norm_mosaic,
    "chunked": rms_norm_chunked,
    "reference": rms_norm_chunked,
}


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    residual: jax.Array | None = None,
    gate: jax.Array | None = None,
    zero_centered: bool = False,
    cast_first: bool = False,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """With s = x + residual: y = s / sqrt(mean(s^2) + eps) * weight * silu(gate), and s.

    The mean is over the last axis. All is float32 (float64 for float64 inputs) but the sum s, which
    has the dtype of x. Who uses s after the norm should take it from here: then its gradient
    joins that of y in the same pass.

    Args:
      x: [B, T, d] or [B, T, H, d], any float dtype.
      weight: [d].
      eps: added to the mean; not negative.
      residual: shape of x, or None for nothing.
      gate: shape of x, or None for none; not with a residual.
      zero_centered: multiply by 1 + weight.
      cast_first: multiply by the weight in the dtype of x; not with a gate or zero_centered.
      impl: "auto", "mosaic" (NVIDIA Hopper: bfloat16, from 512 rows on, d 64 or 128, or divisible
        by 1024 up to 8192), "chunked" or "reference" (the same in this operator).
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`), or None: rows, tokens and heads are
        split as between operators.

    Returns:
      (y, s), shape and dtype of x.

    Raises:
      ValueError: an argument has the wrong shape or value.
    """
    op = "rms_norm"
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(
            f"{op}: x has shape {x.shape}, expected [B, T, d] or [B, T, H, d], none of them 0."
        )
    check(op, "x", x, x.shape, "B, T, d")
    check(op, "weight", weight, x.shape[-1:], "d")
    for name, other in {"residual": residual, "gate": gate}.items():
        if other is not None:
            check(op, name, other, x.shape, "as x")
    if finite(op, "eps", eps, 0) < 0:
        raise ValueError(f"{op}: eps={eps} must not be negative.")
    if gate is not None and (zero_centered or residual is not None):
        raise ValueError(f"{op}: a gate comes without a residual and without zero_centered.")
    if cast_first and (zero_centered or gate is not None):
        raise ValueError(f"{op}: cast_first comes without zero_centered and without a gate.")
    inputs = Inputs(
        x,
        weight,
        None if residual is None else residual.astype(x.dtype),
        None if gate is None else gate.astype(x.dtype),
    )
    dims: Any = "bTd" if x.ndim == 3 else "bTEd"
    shape = sharded.local_shape(mesh, dims, x.shape)
    usable = dict.fromkeys(_IMPLS) | {"mosaic": mosaic.why_not(x.dtype, shape)}
    name = resolve(op, impl, usable)
    run = partial(_IMPLS[name], options=Options(float(eps), zero_centered, cast_first))
    if name != "mosaic":  # which the compiler knows how to split
        return run(inputs)
    split = Inputs(x=dims, weight=cast(Any, "d"), residual=dims, gate=dims)
    return sharded.call(run, mesh, x.shape[0], (inputs,), (split,), (dims, dims))
