"""Gated KalmaNet (GKA): linear attention whose query solves a ridge regression over past keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from hmf_jax.convert import rows
from hmf_jax.convert.rows import Row
from hmf_jax.layers import exact, linear, log_decay, split_heads, together
from hmf_jax.mixers.base import Array, Context
from hmf_jax.mixers.kind import BASE, Kind, Section, Sections
from hmf_jax.mixers.linear import (
    FROM_ATTENTION,
    LIMITS,
    QKVO,
    GatedLinearMixer,
    defaults,
    gated_linear_rows,
    geometry,
    l2_normalize,
    state_heads,
)
from hmf_jax.mixers.parts import Parts
from hmf_jax.options import MOST_ITERATIONS, Backbone, check_fields, shown
from hmf_jax.pallas_kernels import gka, gka_step


@dataclasses.dataclass(frozen=True)
class GKAConfig:
    """Gated KalmaNet settings (`gka_config`); the names are those of config.json."""

    use_alpha_connection: bool = True
    use_v_conv: bool = True
    use_forgetting_gate: bool = True
    use_forgetting_gate_kk: bool = True
    use_beta_gate: bool = True
    use_gate: bool = True
    gla_rescale: bool = True
    bp_lambda: bool = True
    num_iter: int = 30
    ridge_strength: float = 0.02
    conv_size: int = 4
    chunk_size: int = 64
    norm_eps: float = 1e-6
    solver_type: str = "chebyshev"
    kv_proj_rank: int | None = None
    kv_learnable_residual: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {**LIMITS, "num_iter": (0, MOST_ITERATIONS)}, "gka_config.")
        if self.solver_type != "chebyshev":
            raise ValueError(
                f"gka_config.solver_type {shown(self.solver_type)} is unknown; set it to "
                "'chebyshev'"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GKAState:
    """Gated KalmaNet: the last conv_size - 1 projections of q, k, v, and two float32 matrices.

    conv_q [B, K-1, Hq*D], conv_k [B, K-1, Hk*D], conv_v [B, K-1, Hv*D] (None where there is no
    convolution);
    h_kk [B, H, D, D] key covariance, h_kv [B, H, D, D] (key dim, value dim).
    """

    conv_q: Array | None
    conv_k: Array | None
    conv_v: Array | None
    h_kk: Array
    h_kv: Array


class GatedKalmaNet(GatedLinearMixer):
    """Projections, short convolutions, gates, then `hmf_jax.pallas_kernels.gka`.

    Source: Gated KalmaNet, arXiv 2511.21016. The log-decay and both gates are float32. The key
    covariance is kept up to date even with num_iter = 0, so num_iter may change between calls.
    """

    c: GKAConfig

    def __init__(self, config: Backbone, c: GKAConfig, *, dtype, rngs: nnx.Rngs):
        convs = (True, True, c.use_v_conv)
        super().__init__(config, c, dtype=dtype, rngs=rngs, convs=convs)

        def gate(bias: bool) -> nnx.Linear:
            d, H = config.hidden_size, self.heads
            return linear(d, H, ("embed", "heads"), config, dtype, rngs, bias)

        self.a_proj = gate(bias=False)
        self.b_proj = gate(bias=True) if c.use_beta_gate else None
        self.alpha_proj = gate(bias=True) if c.use_alpha_connection else None

    def __call__(
        self, x: Array, ctx: Context, state: GKAState | None = None
    ) -> tuple[Array, GKAState | None]:
        c, s = self.c, state
        a_proj = self.a_proj if c.use_forgetting_gate else None
        q, k, v, gate, *gates = together(
            x, self.q_proj, self.k_proj, self.v_proj, self.g_proj,
            self.alpha_proj, self.b_proj, a_proj,
        )  # fmt: skip
        q, conv_q = self.convolve(q, self.q_conv1d, ctx, s and s.conv_q, silu=True)
        k, conv_k = self.convolve(k, self.k_conv1d, ctx, s and s.conv_k, silu=True)
        v, conv_v = self.convolve(v, self.v_conv1d, ctx, s and s.conv_v, silu=False)
        q = self.repeat(split_heads(q, self.head_dim))
        q = l2_normalize(q, 1e-6, under_root=False)
        k = l2_normalize(self.expand(k, self.proj_k, self.k_rep), 1e-6, under_root=False)
        v = self.expand(v, self.proj_v, self.v_rep)
        q, k = q.astype(v.dtype), k.astype(v.dtype)

        alpha, beta, g = (None if a is None else ctx.over_tokens(a) for a in gates)
        if alpha is not None:
            alpha = jax.nn.sigmoid(exact(alpha))
        if beta is not None:
            beta = jax.nn.sigmoid(exact(beta)) + 1e-6
        if g is not None:
            g = log_decay(self.A_log[...], g, self.dt_bias[...])[1]

        options = {
            "num_iter": c.num_iter if ctx.num_iter is None else ctx.num_iter,
            "ridge": c.ridge_strength,
            "scale": None if c.gla_rescale else 1.0,
            "decay_kk": c.use_forgetting_gate_kk,
            "solver": ctx.solver,
            **ctx.options,
        }
        if state is not None and x.shape[1] == 1:
            alpha, g, beta = (None if a is None else a[:, 0] for a in (alpha, g, beta))
            h = state.h_kk, state.h_kv
            o, h = gka_step(
                q[:, 0], k[:, 0], v[:, 0], alpha, g, beta, h, active=ctx.active, **options
            )
            o = o[:, None]
        else:
            o, h = gka(
                q,
                k,
                v,
                alpha,
                g,
                beta,
                bp_lambda=c.bp_lambda,
                initial_state=None if state is None else (state.h_kk, state.h_kv),
                **ctx.padding,
                chunk_size=c.chunk_size,
                **options,
            )
        y = self.output(o, gate, ctx)
        return y, None if state is None else GKAState(conv_q, conv_k, conv_v, *h)

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> GKAState:
        """Zeros; the size does not depend on capacity."""
        convs = self.conv_states(batch, dtype, mesh)
        return GKAState(*convs, self.matrix(batch, dtype, mesh), self.matrix(batch, dtype, mesh))


def _rows(config: Backbone, sections: Sections) -> list[Row]:
    c, gate = sections["gka"], (state_heads(config), config.hidden_size)
    convs = "qkv" if c.use_v_conv else "qk"
    # The decay is stored even if use_forgetting_gate is off.
    found = gated_linear_rows(config, c, decay="a_proj", convs=convs)
    if c.use_beta_gate:
        found += rows.linear(*gate, "b_proj", bias=True)
    if c.use_alpha_connection:
        found += rows.linear(*gate, "alpha_proj", bias=True)
    return found


def _compose(parts: Parts, sections: Sections, state: Any, whole: Any) -> GKAState:
    """Fused, the matrices are added up: they are sums over tokens."""
    mean = parts.soup(state)
    if parts.ssm != "fuse":
        return mean
    h_kk, h_kv = parts.sum(state.h_kk), parts.sum(state.h_kv)
    return dataclasses.replace(mean, h_kk=h_kk, h_kv=h_kv)


# A Gated DeltaNet is a GKA without the solver; b_proj.bias and alpha_proj are fresh.
_SAME = ("g_proj", "b_proj", "q_conv1d", "k_conv1d", "v_conv1d", "A_log", "dt_bias", "o_norm")
_LOW_RANK = ("proj_k", "proj_v", "k_rep", "v_rep")
_FROM_GDN = {**QKVO, "a_proj": "gk_proj", **{name: name for name in (*_SAME, *_LOW_RANK)}}

GKA = Kind(
    symbol="GKA",
    label="Gated KalmaNet",
    name="gka",
    make=lambda config, sections, *, dtype, rngs: GatedKalmaNet(
        config, sections["gka"], dtype=dtype, rngs=rngs
    ),
    rows=_rows,
    section=Section(
        attribute="gka",
        key="gka_config",
        type=GKAConfig,
        geometry=geometry,
        defaults=defaults,
        patch="gka_overrides",
    ),
    details=lambda sections: f"{sections['gka'].num_iter} Chebyshev iterations",
    aliases=("gka", "gated_kalmanet", "parallel_latent_sketch"),
    starts={BASE: lambda sections: FROM_ATTENTION, "GDN": lambda sections: _FROM_GDN},
    compose=_compose,
    fuses=True,
    solves=True,
)
