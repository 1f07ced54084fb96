"""All that touches private or version-dependent parts of JAX (0.11.2 to 0.12.0.1), in one file.

Everything else in hmf_jax and benchmarks uses JAX's public interface; a test sees to it.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
from jax.core import Tracer
from jax.experimental.mosaic.gpu import utils as _mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

# Type checkers take these for private or abstract.
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
TilingTransform: Any = plgpu.TilingTransform
SwizzleTransform: Any = plgpu.SwizzleTransform

JAX = ("jax", "jaxlib")  # the packages that programs are made by


def is_traced(x: Any) -> bool:
    """Whether the value of `x` is known only when the program runs."""
    return isinstance(x, Tracer)


def tracing() -> bool:
    """Whether JAX is tracing a function just now (`jax.jit`, `jax.grad`, `jax.vmap`, ...)."""
    from jax._src.core import trace_state_clean

    return not trace_state_clean()


def setting(name: str) -> Any:
    """A setting of JAX, None if this version does not have it."""
    return getattr(jax.config, name, None)


def compute_capability() -> str:
    """Compute capability of the first device, such as "9.0"; "" where it has none."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def multiprocessors() -> int:
    """Of the first device, if it is a GPU; else those of an H100 or H200."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def warpgroup_barrier() -> None:
    """In a Mosaic kernel: orders the accesses of a warpgroup to shared memory, no more.

    (`plgpu.commit_smem` would also fence the copy engine.)
    """
    inline: Any = plgpu.inline_mgpu()(lambda _: _mosaic_utils.warpgroup_barrier())
    inline()


def store_rows(ref: Any, x: jax.Array) -> None:
    """In a Mosaic kernel: ref[...] = x, shared memory whose rows are not permuted (swizzled).

    Its banks conflict, which newer jax wants to be told.
    """
    store: Any = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = x
    else:
        store(ref, x, optimized=False)


def is_cudnn_attention(primitive: Any) -> bool:
    """Whether this is cuDNN's forward pass, as policies of `jax.checkpoint` see it."""
    return primitive.name.startswith("dot_product_attention_fwd")


def find_cudnn() -> Any:
    """The module below `jax.nn.dot_product_attention`, implementation "cudnn", which returns the
    log-sum-exp unrounded; None where this jax has changed it."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as found

        takes = set(inspect.signature(found.dot_product_attention).parameters)
    except (ImportError, AttributeError):
        return None
    wanted = {"scale", "mask_type", "sliding_window_length", "q_seqlen", "kv_seqlen"}
    return found if wanted | {"return_residual"} <= takes else None


def find_cudnn_backward() -> Any:
    """cuDNN's backward pass of causal attention in a sliding window, given log-sum-exp and output.

    Returns a function (q, k, v, lse, o, do, *, window, scale) -> (dq, dk, dv), or None where this
    jax has changed what it needs.
    """
    found = find_cudnn()
    primitive = getattr(found, "_dot_product_attention_bwd_p_wrapper", None)
    rule = getattr(found, "_dot_product_attention_bwd_rule", None)
    if primitive is None or rule is None:
        return None
    new = {"score_mod": None} if "score_mod" in inspect.signature(rule).parameters else {}

    def backward(
        q: jax.Array, k: jax.Array, v: jax.Array, lse: jax.Array, o: jax.Array, do: jax.Array,
        *, window: int, scale: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        none = [jax.numpy.zeros(0, q.dtype)] * 7  # no bias, lengths, offsets, pages
        dq, dk, dv, *_ = primitive.bind(
            q, k, v, *none, lse, o, do.astype(o.dtype),
            scale=scale, seed=0, dropout_rate=0.0, variadic_args=(False, False),
            mask_type=found.MaskType.CAUSAL, sliding_window_length=window,
            layout=found.AttentionLayout.BTNH.value, **new,
        )  # fmt: skip
        return dq, dk, dv

    return backward
