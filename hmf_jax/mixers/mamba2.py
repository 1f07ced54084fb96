"""Mamba2 with attention-shaped projections (x = V, B = K, C = Q): the state space dual, SSD."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.convert import rows
from hmf_jax.convert.rows import Row
from hmf_jax.layers import (
    RMSNorm,
    apply_rope,
    decay_params,
    exact,
    exact_dtype,
    linear,
    log_decay,
    merge_heads,
    rms,
    split_heads,
    together,
)
from hmf_jax.mixers.base import Array, Context, Mixer, zeros
from hmf_jax.mixers.kind import BASE, GATE, Kind, Section, Sections
from hmf_jax.mixers.linear import ShortConv
from hmf_jax.mixers.parts import Parts
from hmf_jax.options import Backbone, check_bool, check_fields
from hmf_jax.pallas_kernels import ssd, ssd_step

CONV_SIZE = 4


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Mamba2 settings (`mamba2_config`); the convolution always has four taps and a bias."""

    use_qk_norm: bool = True
    use_pos_emb: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {}, "mamba2_config.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
    """Mamba2: convolution histories of x, B, C; s [B, H, P, N]; log_decay [B, H].

    log_decay is the sum of dt * A over all tokens seen (state composition needs it).
    """

    conv_x: Array
    conv_B: Array
    conv_C: Array
    s: Array
    log_decay: Array


class GatedGroupNorm(nnx.Module):
    """The output norm: gate first, then RMSNorm per head: rms(x * silu(gate)) * weight."""

    def __init__(self, size: int, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype), dims=("heads",))
        self.eps = eps

    def __call__(self, x: Array, gate: Array) -> Array:
        """x, gate [B, T, H, D] -> [B, T, H, D] in x.dtype; one cast at the end."""
        y = rms(exact(x) * jax.nn.silu(exact(gate)), self.eps)
        weight = exact(self.weight[...]).reshape(x.shape[-2:])
        return (y * weight).astype(x.dtype)


class Mamba2(Mixer):
    """Projections, norms on B and C, short convolutions, then `hmf_jax.pallas_kernels.ssd`.

    Source: Mamba-2, arXiv 2405.21060. H heads of state [P, N] = [head_dim, head_dim]; x and B have
    the key/value heads and are shared by groups of query heads. The blocks of the checkpoint's
    merged in_proj (z | x | B | C | dt) and conv1d (x | B | C) are separate parameters here, so
    that each one is split over devices by its own heads.
    """

    def __init__(self, config: Backbone, c: Mamba2Config, *, dtype, rngs: nnx.Rngs):
        d, D, H = config.hidden_size, config.head_dim, config.num_attention_heads
        nq, nk = config.query_width, config.key_width
        self.z_proj = linear(d, nq, ("embed", "heads"), config, dtype, rngs)
        self.x_proj = linear(d, nk, ("embed", "kv_heads"), config, dtype, rngs)
        self.B_proj = linear(d, nk, ("embed", "kv_heads"), config, dtype, rngs)
        self.C_proj = linear(d, nq, ("embed", "heads"), config, dtype, rngs)
        self.dt_proj = linear(d, H, ("embed", "heads"), config, dtype, rngs)
        self.x_conv1d = ShortConv(nk, CONV_SIZE, "kv_heads", config, dtype, rngs, bias=True)
        self.B_conv1d = ShortConv(nk, CONV_SIZE, "kv_heads", config, dtype, rngs, bias=True)
        self.C_conv1d = ShortConv(nq, CONV_SIZE, "heads", config, dtype, rngs, bias=True)
        self.A_log, self.dt_bias = decay_params(H, rngs)
        self.D = nnx.Param(jnp.ones(H, jnp.float32), dims=("heads",))
        normed, centered = _normed(config, c), config.zero_centered_norm
        self.B_norm = RMSNorm(D, 1e-6, dtype, zero_centered=centered) if normed else None
        self.C_norm = RMSNorm(D, 1e-6, dtype, zero_centered=centered) if normed else None
        self.norm = GatedGroupNorm(nq, 1e-5, dtype)
        self.out_proj = linear(nq, d, ("heads", "embed"), config, dtype, rngs)
        self.head_dim, self.heads, self.use_rope = D, H, c.use_pos_emb

    def __call__(
        self, x: Array, ctx: Context, state: Mamba2State | None = None
    ) -> tuple[Array, Mamba2State | None]:
        def heads(a: Array) -> Array:
            return split_heads(a, self.head_dim)

        def key_like(a: Array, norm: RMSNorm | None) -> Array:
            a = heads(a) if norm is None else norm(heads(a))
            return merge_heads(apply_rope(a, ctx.rope) if self.use_rope else a)

        s = state
        gate, u, B, C, dt = together(
            x, self.z_proj, self.x_proj, self.B_proj, self.C_proj, self.dt_proj
        )
        u, conv_x = self.x_conv1d(u, ctx=ctx, state=s and s.conv_x)
        B, conv_B = self.B_conv1d(key_like(B, self.B_norm), ctx=ctx, state=s and s.conv_B)
        C, conv_C = self.C_conv1d(key_like(C, self.C_norm), ctx=ctx, state=s and s.conv_C)
        u, B, C = heads(u), heads(B), heads(C)
        A, D = -jnp.exp(exact(self.A_log[...])), exact(self.D[...])
        dt, _ = log_decay(self.A_log[...], ctx.over_tokens(dt), self.dt_bias[...])
        dt = ctx.mask(dt)

        if state is not None and x.shape[1] == 1:
            u, B, C, dt_now = (a[:, 0] for a in (ctx.mask(u), B, C, dt))
            y, matrix = ssd_step(u, B, C, dt_now, A, D, state.s, **ctx.options)
            y = y[:, None]
        else:
            y, matrix = ssd(
                u,
                B,
                C,
                dt,
                A,
                D,
                initial_state=None if state is None else state.s,
                **ctx.padding,
                **ctx.options,
            )
        y = self.out_proj(merge_heads(self.norm(ctx.over_tokens(y), heads(gate))))
        if state is None:
            return y, None
        total = state.log_decay + jnp.sum(dt, axis=1) * A
        return y, Mamba2State(conv_x, conv_B, conv_C, matrix, total)

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> Mamba2State:
        """Zeros; the size does not depend on capacity."""
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        dims = ("batch", "heads", None, None)
        return Mamba2State(
            self.x_conv1d.init_state(batch, dtype, mesh),
            self.B_conv1d.init_state(batch, dtype, mesh),
            self.C_conv1d.init_state(batch, dtype, mesh),
            zeros(shape, dims, exact_dtype(dtype), mesh),
            zeros(shape[:2], dims[:2], exact_dtype(dtype), mesh),
        )


def _normed(config: Backbone, c: Mamba2Config) -> bool:
    """Whether B and C, the keys and queries, are normalised: only where those of attention are."""
    return c.use_qk_norm and config.qk_norm


def _rows(config: Backbone, sections: Sections) -> list[Row]:
    d, heads = config.hidden_size, config.num_attention_heads
    nq, nk = config.query_width, config.key_width
    found: list[Row] = []
    for block, width in (("z", nq), ("x", nk), ("B", nk), ("C", nq), ("dt", heads)):
        found += rows.linear(width, d, "in_proj", path=f"{block}_proj")
    for block, width in (("x", nk), ("B", nk), ("C", nq)):
        found += rows.conv(width, CONV_SIZE, "conv1d", bias=True, path=f"{block}_conv1d")
    found += rows.vector(heads, "A_log", "dt_bias", "D") + rows.vector(nq, "norm.weight")
    if _normed(config, sections["mamba2"]):
        found += rows.vector(config.head_dim, "B_norm.weight", "C_norm.weight")
    return found + rows.linear(d, nq, "out_proj")


def _compose(parts: Parts, sections: Sections, state: Any, whole: Any) -> Mamba2State:
    """Fused: the mean over all orders in which the parts could follow each other (PICASO-S)."""
    mean = parts.soup(state)
    if parts.ssm == "zero":
        return mean
    mean = dataclasses.replace(mean, log_decay=parts.sum(state.log_decay))
    if parts.ssm == "soup":
        return mean
    weights = picaso_weights(state.log_decay)
    return dataclasses.replace(mean, s=parts.sum(weights[..., None, None] * state.s))


def picaso_weights(log_decay: Array) -> Array:
    """Weights of N states in their sum, averaged over all orders of their parts.

    In one order, state i decays by what the parts after it decay: S <- a_next S + S_next. Over all
    N! orders a state's weight is the mean over m of the elementary symmetric polynomials of the
    other parts' decays, c_i = 1/N sum_m e_m({a_j, j != i}) / binom(N - 1, m) (PICASO-S).

    Args:
      log_decay: [N, ...] log a_i, what a part decays an earlier state by.

    Returns:
      [N, ...] c_i; computed in log space.
    """
    N = len(log_decay)
    others = [[j for j in range(N) if j != i] for i in range(N)]
    polynomials = jnp.full((N, N, *log_decay.shape[1:]), -jnp.inf, log_decay.dtype)
    polynomials = polynomials.at[:, 0].set(0)  # [i, m]: log e_m of the parts so far
    for step in range(N - 1):
        a = log_decay[jnp.array([other[step] for other in others])]
        longer = jnp.logaddexp(polynomials[:, 1:], a[:, None] + polynomials[:, :-1])
        polynomials = polynomials.at[:, 1:].set(longer)
    orders = jnp.log(jnp.array([N * math.comb(N - 1, m) for m in range(N)], log_decay.dtype))
    orders = orders.reshape(1, N, *([1] * (log_decay.ndim - 1)))
    return jnp.exp(jax.nn.logsumexp(polynomials - orders, axis=1))


def _geometry(config: Backbone) -> dict[str, Any]:
    heads, D = config.num_attention_heads, config.head_dim
    return {
        "d_model": config.hidden_size,
        "d_inner": config.query_width,
        "d_xb": config.key_width,
        "ssm_cfg": {"expand": 1, "ngroups": heads, "d_state": D},
    }


def _derived(config: Backbone, layers: int) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "n_layer": layers,
    }


# The original's model code writes use_pos_emb; its serving plugin reads the other names.
_POS_EMB = ("use_pos_emb", "use_pos_embed", "use_rotary_emb")


def _read(stored: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(stored)
    given = {n: out.pop(n) for n in _POS_EMB if n in out}
    found = {n: check_bool(f"mamba2_config.{n}", v) for n, v in given.items() if v is not None}
    if len(set(found.values())) > 1:
        raise ValueError(f"mamba2_config contradicts itself: {found}; make them equal")
    if found:
        out["use_pos_emb"] = any(found.values())
    return out


M2 = Kind(
    symbol="M2",
    label="Mamba-2",
    name="mamba",
    make=lambda config, sections, *, dtype, rngs: Mamba2(
        config, sections["mamba2"], dtype=dtype, rngs=rngs
    ),
    rows=_rows,
    section=Section(
        attribute="mamba2",
        key="mamba2_config",
        type=Mamba2Config,
        geometry=_geometry,
        derived=_derived,
        read=_read,
        write=lambda c: dict.fromkeys(_POS_EMB, True) if c.use_pos_emb else {},
    ),
    aliases=("mamba2", "mamba", "m2"),
    starts={
        BASE: lambda sections: {
            "z_proj": GATE,
            "x_proj": "v_proj",
            "B_proj": "k_proj",
            "C_proj": "q_proj",
            "out_proj": "o_proj",
            "B_norm": "k_norm",
            "C_norm": "q_norm",
        }
    },
    compose=_compose,
    fuses=True,
)
