"""Building blocks that every layer kind shares. Shapes: B batch, T tokens, d hidden, D head dim."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.moved import moved
from hmf_jax.options import Backbone

Array = jax.Array
Dims = tuple[str | None, ...]


def one_row_twice[Y](f: Callable[[Array], Y], x: Array) -> Y:
    """f(x), row by row, of x [B, T, ...]; where B = T = 1, of two copies of the only row.
    f returns an array or several.

    On GPUs XLA makes of a product of one row and a matrix of less than 10^7 elements an elementwise
    product and a sum, with few thread blocks, and of the lookup of one row in a table that is split
    over devices a slice of the whole table, gathered. Decoding one sequence of an 8B model takes a
    quarter longer then, on four GPUs twice as long. Several rows that a mesh spreads one to a
    device are not noticed here.
    """
    if x.shape[:2] != (1, 1):
        return f(x)
    return jax.tree.map(lambda y: y[:, :1], f(jnp.broadcast_to(x, (1, 2, *x.shape[2:]))))


def in_dtype_of_first[T: tuple[Any, ...]](
    arrays: T, /, *, dtype: Any = None, inexact: bool = True
) -> T:
    """The `promote_dtype` of NNX layers that compute in their input's dtype, whatever their
    parameters have: (input, kernel, bias), or the table of embeddings alone."""
    found: Any = tuple(None if x is None else x.astype(arrays[0].dtype) for x in arrays)
    return found


class _Untabulated:
    def __init__(self, method: Callable[..., Any]):
        self.__doc__, self._method = method.__doc__, method

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self._method, instance)


def untabulated[F: Callable[..., Any]](method: F) -> F:
    """A method that `nnx.tabulate` leaves alone. It runs every function of a module's class as a
    program of its own, which those that take or return more than arrays do not survive."""
    return cast(F, _Untabulated(method))


def without_dtype[L: nnx.Linear | nnx.Embed](layer: L) -> L:
    """The layer without the dtypes it was made with: its arrays say theirs, casts change them."""
    vars(layer).update(dtype=None, param_dtype=None)
    return layer


def _dot_general(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    return one_row_twice(lambda x: jax.lax.dot_general(x, kernel, *args, **options), x)


def linear(
    n_in: int,
    n_out: int,
    dims: Dims,
    config: Backbone,
    dtype,
    rngs: nnx.Rngs,
    bias: bool = False,
) -> nnx.Linear:
    """`nnx.Linear` with kernel [n_in, n_out] ~ N(0, initializer_range) and named dimensions."""
    layer = nnx.Linear(
        n_in,
        n_out,
        use_bias=bias,
        param_dtype=dtype,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dot_general=_dot_general,
        promote_dtype=in_dtype_of_first,
        rngs=rngs,
        kernel_metadata={"dims": dims},
        bias_metadata={"dims": dims[1:]},
    )
    return without_dtype(layer)


def together(x: Array, *projections: Any) -> list[Any]:
    """[p(x) for p in projections]; None stays None.

    Those that have a method of this name make their products at once, see `LoRALinear.together`.
    """
    found = [p for p in projections if hasattr(p, "together")]
    made = iter(found[0].together(x, found[1:]) if found else ())
    return [
        next(made) if hasattr(p, "together") else None if p is None else p(x) for p in projections
    ]


def exact_dtype(dtype):
    """What states, gates and norms are computed in: float32 (float64 in float64 models)."""
    return jnp.promote_types(dtype, jnp.float32)


def exact(x: Array) -> Array:
    """x in `exact_dtype`."""
    return x.astype(exact_dtype(x.dtype))


def rms(x: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    x = exact(x)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """weight * dtype(x / rms(x)): statistics in float32, cast to x.dtype before the weight.

    With `zero_centered`, dtype(x / rms(x) * (1 + weight)): all in float32, cast at the end.
    """

    def __init__(
        self, size: int, eps: float, dtype, dims: Dims = (None,), *, zero_centered: bool = False
    ):
        fresh = jnp.zeros if zero_centered else jnp.ones
        self.weight = nnx.Param(fresh(size, dtype), dims=dims)
        self.eps, self.zero_centered = eps, zero_centered

    def __call__(self, x: Array) -> Array:
        if self.zero_centered:
            y = rms(x, self.eps)
            return (y * (1 + self.weight[...].astype(y.dtype))).astype(x.dtype)
        return self.weight[...].astype(x.dtype) * rms(x, self.eps).astype(x.dtype)


def backbone_norm(size: int, config: Backbone, dtype) -> RMSNorm:
    """The norm that blocks, queries, keys and the last hidden states have."""
    return RMSNorm(size, config.rms_norm_eps, dtype, zero_centered=config.zero_centered_norm)


class MLP(nnx.Module):
    """SwiGLU: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: Backbone, dtype, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = linear(d, f, ("embed", "mlp"), config, dtype, rngs, bias)
        self.up_proj = linear(d, f, ("embed", "mlp"), config, dtype, rngs, bias)
        self.down_proj = linear(f, d, ("mlp", "embed"), config, dtype, rngs, bias)

    def __call__(self, x: Array) -> Array:
        gate, up = together(x, self.gate_proj, self.up_proj)
        return self.down_proj(jax.nn.silu(gate) * up)


def split_heads(x: Array, head_dim: int) -> Array:
    """[B, T, H * D] -> [B, T, H, D]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def merge_heads(x: Array) -> Array:
    """[B, T, H, D] -> [B, T, H * D]."""
    return x.reshape(*x.shape[:-2], -1)


def log_decay(A_log: Array, x: Array, dt_bias: Array) -> tuple[Array, Array]:
    """Step size softplus(x + dt_bias) and log-decay -exp(A_log) * step, both float32 [B, T, H]."""
    step = jax.nn.softplus(exact(x) + exact(dt_bias))
    return step, -jnp.exp(exact(A_log)) * step


def decay_params(heads: int, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
    """Fresh A_log, dt_bias, float32 [H]: A ~ U(0, 16), softplus(dt_bias) ~ log-U(1e-3, 0.1)."""
    A = jax.random.uniform(rngs.params(), (heads,), jnp.float32, minval=1e-3, maxval=16.0)
    low, high = math.log(1e-3), math.log(0.1)
    log_dt = jax.random.uniform(rngs.params(), (heads,), jnp.float32, minval=low, maxval=high)
    dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
    inverse_softplus = dt + jnp.log(-jnp.expm1(-dt))
    dims = ("heads",)
    return nnx.Param(jnp.log(A), dims=dims), nnx.Param(inverse_softplus, dims=dims)


def rope_frequencies(config: Backbone) -> tuple[Array, float]:
    """Inverse frequencies float32 [R/2] and the factor that multiplies cos and sin.

    R is `rotary_dim`, the rotated channels of a head. "default": theta^(-2i/R). "linear": divided
    by `factor`. "llama3" and "yarn" (Peng et al. 2023): slow dimensions are divided by `factor`,
    fast ones kept. Between them there is a linear ramp, in "llama3" over the turns that a dimension
    makes within the original context, from low_freq_factor to high_freq_factor; in "yarn" over the
    dimensions, from the one that makes beta_fast turns to the one that makes beta_slow.
    """
    rope, R = config.rope, config.rotary_dim
    frequency = 1.0 / rope.theta ** (jnp.arange(0, R, 2, dtype=jnp.float32) / R)
    if rope.rope_type == "default":
        return frequency, 1.0
    factor = rope.factor or 1.0
    if rope.rope_type == "linear":
        return frequency / factor, 1.0
    context = rope.original_max_position_embeddings or config.max_position_embeddings
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
        turns = context / (2 * math.pi / frequency)
        fast = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequency / factor * (1.0 - fast) + frequency * fast, 1.0

    def dimension(turns: float) -> float:
        wavelength = context / (turns * 2 * math.pi)
        return R * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    slow = jnp.clip((jnp.arange(R // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequency = frequency / factor * slow + frequency * (1.0 - slow)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return frequency, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequency, temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return frequency, temperature(1.0)


def rope_table(positions: Array, config: Backbone) -> tuple[Array, Array]:
    """cos, sin float32 [B, T, 1, R/2] of rotary position embeddings for positions [B, T]."""
    frequency, scale = rope_frequencies(config)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def query_scale(positions: Array, config: Backbone) -> Array | None:
    """Factor float32 [B, T, 1, 1] of the rotated queries of attention at positions [B, T].

    1 + beta * log(1 + floor(position / original context)), with beta `llama_4_scaling_beta`; None
    where that is not set. Positions below zero, as padding may have, count as zero.
    """
    rope = config.rope
    if not rope.llama_4_scaling_beta:
        return None
    context = rope.original_max_position_embeddings or config.max_position_embeddings
    contexts = (jnp.maximum(positions, 0) // context).astype(jnp.float32)
    return (1 + rope.llama_4_scaling_beta * jnp.log1p(contexts))[..., None, None]


def apply_rope(x: Array, table: tuple[Array, Array]) -> Array:
    """Rotate the first R channels of x [B, T, H, D], float32 inside; the others stay as they are.

    Channel i turns with channel i + R/2 (half-split convention).
    """
    cos, sin = table
    half, D = cos.shape[-1], x.shape[-1]
    a, b, *rest = jnp.split(exact(x), [half, 2 * half] if 2 * half < D else 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], axis=-1).astype(x.dtype)


__getattr__ = moved(
    __name__,
    {
        "GatedGroupNorm": "is now hmf_jax.mixers.mamba2.GatedGroupNorm",
        "OutputNorm": "is now hmf_jax.mixers.linear.OutputNorm",
    },
)
