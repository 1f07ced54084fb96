"""What Gated KalmaNet and Gated DeltaNet share: projections, short convolutions, head expansion."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.convert import rows
from hmf_jax.convert.rows import Row
from hmf_jax.layers import (
    decay_params,
    exact,
    exact_dtype,
    linear,
    merge_heads,
    rms,
    split_heads,
    untabulated,
)
from hmf_jax.mixers.base import Array, Context, Mixer, zeros
from hmf_jax.mixers.kind import GATE
from hmf_jax.options import WIDEST, Backbone
from hmf_jax.pallas_kernels import causal_conv1d

Channels = Literal["heads", "kv_heads"]

# Ranges of settings of both. A chunk is a square matrix in memory.
LIMITS = {
    "ridge_strength": (0, 1e6),
    "conv_size": (1, 64),
    "chunk_size": (1, 4096),
    "norm_eps": (1e-30, 1),
    "kv_proj_rank": (1, WIDEST),
}
# What both start from in stage 0 of priming, see `Kind.starts`.
QKVO = {f"{p}_proj": f"{p}_proj" for p in "qkvo"}
FROM_ATTENTION = {**QKVO, "g_proj": GATE}


class ShortConv(nnx.Module):
    """Depthwise causal convolution over time, then SiLU. weight [K, C]; weight[-1] is now."""

    def __init__(
        self,
        channels: int,
        size: int,
        dim: Channels,
        config: Backbone,
        dtype,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        init = nnx.initializers.normal(config.initializer_range)
        self.weight = nnx.Param(init(rngs.params(), (size, channels), dtype), dims=(None, dim))
        self.bias = nnx.Param(jnp.zeros(channels, dtype), dims=(dim,)) if bias else None
        self.letter: Literal["h", "k"] = "h" if dim == "heads" else "k"

    def __call__(self, x: Array, ctx: Context, state: Array | None) -> tuple[Array, Array]:
        """x [B, T, C], state [B, K-1, C] or None -> (y [B, T, C], the last K-1 inputs)."""
        return causal_conv1d(
            ctx.over_tokens(x),
            self.weight[...],
            None if self.bias is None else self.bias[...],
            initial_state=state,
            **ctx.padding,
            channels=self.letter,
            **ctx.options,
        )

    def init_state(self, batch: int, dtype, mesh) -> Array:
        size, channels = self.weight.shape
        dim = "heads" if self.letter == "h" else "kv_heads"
        return zeros((batch, size - 1, channels), ("batch", None, dim), dtype, mesh)


class OutputNorm(nnx.Module):
    """RMSNorm over head_dim, then an optional SiLU gate: rms(x) * weight * silu(gate)."""

    def __init__(self, size: int, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype), dims=(None,))
        self.eps = eps

    def __call__(self, x: Array, gate: Array | None) -> Array:
        """x, gate [B, T, H, D] -> [B, T, H, D] in x.dtype; one cast at the end."""
        y = rms(x, self.eps) * exact(self.weight[...])
        if gate is not None:
            y = y * jax.nn.silu(exact(gate))
        return y.astype(x.dtype)


class LowRank(nnx.Module):
    """linearB(silu(linearA(x))): the low-rank part of the key/value expansion."""

    def __init__(self, n_in: int, rank: int, n_out: int, config, dtype, rngs: nnx.Rngs):
        self.linearA = linear(n_in, rank, (None, None), config, dtype, rngs)
        self.linearB = linear(rank, n_out, (None, "heads"), config, dtype, rngs)
        self.linearB.kernel[...] = jnp.zeros_like(self.linearB.kernel[...])

    def __call__(self, x: Array) -> Array:
        return self.linearB(jax.nn.silu(self.linearA(x)))


class GatedLinearMixer(Mixer):
    """Base of GKA and GDN; `c` are the settings of either.

    H states, one per query or value head, whichever are more. Keys and values of fewer heads than
    the queries are shared or expanded; queries and keys of fewer heads than the values are
    repeated.
    """

    def __init__(
        self,
        config: Backbone,
        c: Any,
        *,
        dtype,
        rngs: nnx.Rngs,
        convs: tuple[bool, bool, bool],
        conv_bias: bool = False,
    ):
        d, heads = config.hidden_size, config.linear_heads
        D, H = heads.dim, state_heads(config)
        nq, nk, nv, n = heads.q * D, heads.k * D, heads.v * D, H * D
        q_dim: Channels = dimension(config, heads.q)
        k_dim: Channels = dimension(config, heads.k)
        v_dim: Channels = dimension(config, heads.v)
        self.q_proj = linear(d, nq, ("embed", q_dim), config, dtype, rngs)
        self.k_proj = linear(d, nk, ("embed", k_dim), config, dtype, rngs)
        self.v_proj = linear(d, nv, ("embed", v_dim), config, dtype, rngs)
        self.o_proj = linear(n, d, ("heads", "embed"), config, dtype, rngs)

        def conv(wanted: bool, channels: int, dim: Channels) -> ShortConv | None:
            if not wanted:
                return None
            return ShortConv(channels, c.conv_size, dim, config, dtype, rngs, conv_bias)

        self.q_conv1d = conv(convs[0], nq, q_dim)
        self.k_conv1d = conv(convs[1], nk, k_dim)
        self.v_conv1d = conv(convs[2], nv, v_dim)
        gate = linear(d, n, ("embed", "heads"), config, dtype, rngs) if c.use_gate else None
        self.g_proj = gate
        self.o_norm = OutputNorm(D, c.norm_eps, dtype)
        self.A_log, self.dt_bias = decay_params(H, rngs)
        rank = c.kv_proj_rank if expands(config) else None

        def low_rank(width: int) -> LowRank | None:
            return None if rank is None else LowRank(width, rank, n, config, dtype, rngs)

        def repeat(count: int) -> nnx.Param | None:
            if rank is None or not c.kv_learnable_residual:
                return None
            one_hot = jnp.repeat(jnp.eye(count, dtype=dtype), H // count, axis=0)
            return nnx.Param(one_hot, dims=(None, None))

        self.proj_k, self.proj_v = low_rank(nk), low_rank(nv)
        self.k_rep, self.v_rep = repeat(heads.k), repeat(heads.v)
        self.c, self.heads, self.head_dim = c, H, D
        self.shared = heads.k == heads.v

    @untabulated
    def convolve(
        self, x: Array, conv: ShortConv | None, ctx: Context, state: Array | None, silu: bool
    ) -> tuple[Array, Array | None]:
        """Short convolution with its history; without one, SiLU or nothing."""
        if conv is not None:
            return conv(x, ctx=ctx, state=state)
        return (jax.nn.silu(x) if silu else x), None

    @untabulated
    def expand(self, x: Array, low_rank: LowRank | None, rep: nnx.Param | None) -> Array:
        """Keys or values [B, T, K*D] as heads.

        Plain: [B, T, K, D], which operators share among groups of query heads; repeated to H heads
        where there are fewer keys than values. With a low-rank projection: [B, T, H, D] =
        low_rank(x) + the repeated (or learnably mixed) heads.
        """
        heads = split_heads(x, self.head_dim)
        if low_rank is None:
            return heads if self.shared else self.repeat(heads)
        if rep is None:
            residual = self.repeat(heads)
        else:
            residual = jnp.einsum("btkd,hk->bthd", heads, rep[...].astype(x.dtype))
        return split_heads(low_rank(x), self.head_dim) + residual

    @untabulated
    def repeat(self, x: Array) -> Array:
        """[B, T, K, D] -> [B, T, H, D]: every head H / K times, one copy behind the other."""
        count = x.shape[2]
        return x if count == self.heads else jnp.repeat(x, self.heads // count, axis=2)

    @untabulated
    def output(self, o: Array, gate: Array | None, ctx: Context) -> Array:
        """Norm, gate and output projection of o [B, T, H, D]; the gate is [B, T, H * D]."""
        gate = None if gate is None else split_heads(gate, self.head_dim)
        return self.o_proj(merge_heads(self.o_norm(ctx.over_tokens(o), gate)))

    def conv_states(
        self, batch: int, dtype, mesh
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Empty histories of the three convolutions."""

        def one(conv: ShortConv | None) -> Array | None:
            return None if conv is None else conv.init_state(batch, dtype, mesh)

        return one(self.q_conv1d), one(self.k_conv1d), one(self.v_conv1d)

    def matrix(self, batch: int, dtype, mesh) -> Array:
        """An empty float32 state [B, H, D, D] (float64 in float64 models)."""
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return zeros(shape, ("batch", "heads", None, None), exact_dtype(dtype), mesh)


def l2_normalize(x: Array, eps: float, *, under_root: bool) -> Array:
    """Unit vectors along the last axis, in float32 (kept).

    Zero vectors stay zero: GKA adds eps to the norm, GDN adds it under the root.
    """
    x = exact(x)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    if under_root:
        return x * jax.lax.rsqrt(square + eps)
    positive = square > 0  # keeps the gradient of the root finite at zero
    norm = jnp.sqrt(jnp.where(positive, square, 1.0))
    return x / (jnp.where(positive, norm, 0.0) + eps)


def state_heads(config: Backbone) -> int:
    """H, how many states a GKA or GDN has: one per query or value head, whichever are more."""
    heads = config.linear_heads
    return max(heads.q, heads.v)


def expands(config: Backbone) -> bool:
    """Whether keys or values have fewer heads than there are states."""
    heads = config.linear_heads
    return min(heads.k, heads.v) < state_heads(config)


def dimension(config: Backbone, heads: int) -> Channels:
    """The name of a dimension of so many heads, by which a mesh splits it.

    What divides the heads of attention, as tensor parallelism must, divides multiples of them.
    """
    return "kv_heads" if heads % config.num_attention_heads else "heads"


def gated_linear_rows(
    config: Backbone, c: Any, *, decay: str, convs: str, conv_bias: bool = False
) -> list[Row]:
    """The parameters that GKA and GDN share.

    Args:
      config: the backbone.
      c: settings of either.
      decay: name of the decay's projection.
      convs: which of "qkv" are convolved.
      conv_bias: whether the convolutions have a bias.
    """
    d, H, D = config.hidden_size, state_heads(config), config.linear_heads.dim
    counts = dict(zip("qkv", config.linear_heads[:3], strict=True))
    widths = {s: count * D for s, count in counts.items()}
    found = [
        *(row for s, width in widths.items() for row in rows.linear(width, d, f"{s}_proj")),
        *(r for s in convs for r in rows.conv(widths[s], c.conv_size, f"{s}_conv1d", conv_bias)),
        *rows.linear(H, d, decay),
        *rows.vector(H, "A_log", "dt_bias"),
        *rows.vector(D, "o_norm.weight"),
        *rows.linear(d, H * D, "o_proj"),
    ]
    if c.use_gate:
        found += rows.linear(H * D, d, "g_proj")
    if c.kv_proj_rank and expands(config):
        rank = c.kv_proj_rank
        for s in "kv":
            found += rows.linear(rank, widths[s], f"proj_{s}.linearA")
            found += rows.linear(H * D, rank, f"proj_{s}.linearB")
            if c.kv_learnable_residual:
                found.append(Row(f"{s}_rep", f"{s}_rep", (H, counts[s]), "same"))
    return found


def geometry(config: Backbone) -> dict[str, Any]:
    """The copies of the backbone's options in gka_config and gdn_config."""
    heads = config.linear_heads
    return {
        "hidden_size": config.hidden_size,
        "head_dim": heads.dim,
        "num_q_heads": heads.q,
        "num_k_heads": heads.k,
        "num_v_heads": heads.v,
    }


def defaults(config: Backbone) -> dict[str, Any]:
    """Settings that are not given, of models whose linear layers have heads of their own."""
    if config.linear is None:
        return {}
    return {"conv_size": config.linear.conv_size, "norm_eps": config.rms_norm_eps}
