"""What Triton kernels share: the optional packages jax-triton and triton, and where they can run.

Without the packages the kernels stay plain functions that nobody calls.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from hmf_jax.pallas_kernels.compat import compute_capability

try:  # an optional extra
    import jax_triton  # pyright: ignore[reportMissingImports]
    import triton
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    jit: Any = triton.jit  # pyright: ignore[reportAttributeAccessIssue]
    triton_call: Any = jax_triton.triton_call
    MISSING = None
except (ImportError, AttributeError) as error:  # missing, or made for another jax
    tl: Any = None
    jit = triton_call = lambda kernel: kernel
    MISSING = f"jax-triton cannot be imported ({error}; pip install hmf-jax[triton])"


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can."""
    if MISSING is not None:
        return MISSING
    try:
        ampere = jax.devices()[0].platform == "gpu" and float(compute_capability()) >= 8
    except ValueError:  # AMD
        ampere = False
    return None if ampere else "its kernels need an NVIDIA GPU, compute capability 8.0 or newer"
