"""B'MOJO-F attention on Hopper: two key sets of the kernels in attention/mosaic.py."""

from __future__ import annotations

import jax

from hmf_jax.pallas_kernels.ops.attention.mosaic import joint_attention, why_not
from hmf_jax.pallas_kernels.ops.two_window_attention.chunked import make_key_sets
from hmf_jax.pallas_kernels.ops.two_window_attention.inputs import Inputs

__all__ = ["two_window_attention", "why_not"]


def two_window_attention(
    inputs: Inputs, *, window: int, scale: float, interpret: bool = False
) -> jax.Array:
    """`pallas_kernels.two_window_attention` on Hopper.

    Raises:
      ValueError: not bfloat16, a head_dim other than 64 and 128, a scale that is not positive.
    """
    own, fading = make_key_sets(inputs, window=window)
    return joint_attention((fading, own), scale, interpret=interpret)
