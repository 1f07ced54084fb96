"""Gated DeltaNet (GDN): linear attention with the gated delta rule."""

from __future__ import annotations

import dataclasses

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
    GatedLinearMixer,
    defaults,
    gated_linear_rows,
    geometry,
    l2_normalize,
    state_heads,
)
from hmf_jax.options import Backbone, check_fields
from hmf_jax.pallas_kernels import gated_delta_rule, gated_delta_rule_step


@dataclasses.dataclass(frozen=True)
class GDNConfig:
    """Gated DeltaNet settings (`gdn_config`); the names are those of config.json."""

    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    conv_bias: bool = False
    norm_eps: float = 1e-5
    kv_proj_rank: int | None = None
    kv_learnable_residual: bool = False

    def __post_init__(self) -> None:
        check_fields(self, LIMITS, "gdn_config.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GDNState:
    """Gated DeltaNet: the last conv_size - 1 projections of q, k, v, and a float32 matrix.

    conv_q [B, K-1, Hq*D], conv_k [B, K-1, Hk*D], conv_v [B, K-1, Hv*D] (None where there is no
    convolution);
    s [B, H, D, D] (key dim, value dim).
    """

    conv_q: Array | None
    conv_k: Array | None
    conv_v: Array | None
    s: Array


class GatedDeltaNet(GatedLinearMixer):
    """Projections, short convolutions, gates, then `hmf_jax.pallas_kernels.gated_delta_rule`.

    Source: Gated Delta Networks, arXiv 2412.06464. The log-decay and the write gate are float32.
    """

    c: GDNConfig

    def __init__(self, config: Backbone, c: GDNConfig, *, dtype, rngs: nnx.Rngs):
        convs = (c.use_short_conv, c.use_short_conv, c.use_short_conv)
        super().__init__(config, c, dtype=dtype, rngs=rngs, convs=convs, conv_bias=c.conv_bias)
        d, H = config.hidden_size, self.heads
        self.gk_proj = linear(d, H, ("embed", "heads"), config, dtype, rngs)
        self.b_proj = linear(d, H, ("embed", "heads"), config, dtype, rngs)

    def __call__(
        self, x: Array, ctx: Context, state: GDNState | None = None
    ) -> tuple[Array, GDNState | None]:
        s = state
        q, k, v, gate, beta, g = together(
            x, self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.b_proj, self.gk_proj
        )
        q, conv_q = self.convolve(q, self.q_conv1d, ctx, s and s.conv_q, silu=True)
        k, conv_k = self.convolve(k, self.k_conv1d, ctx, s and s.conv_k, silu=True)
        v, conv_v = self.convolve(v, self.v_conv1d, ctx, s and s.conv_v, silu=True)
        q = self.repeat(split_heads(q, self.head_dim))
        q = l2_normalize(q, 1e-6, under_root=True)
        k = l2_normalize(self.expand(k, self.proj_k, self.k_rep), 1e-6, under_root=True)
        v = self.expand(v, self.proj_v, self.v_rep)
        q, k = q.astype(v.dtype), k.astype(v.dtype)
        beta = jax.nn.sigmoid(exact(ctx.over_tokens(beta)))
        if self.c.allow_neg_eigval:
            beta = 2.0 * beta
        g = log_decay(self.A_log[...], ctx.over_tokens(g), self.dt_bias[...])[1]

        if state is not None and x.shape[1] == 1:
            q, k, v, g, beta = (ctx.mask(a)[:, 0] for a in (q, k, v, g, beta))
            o, matrix = gated_delta_rule_step(q, k, v, g, beta, state.s, **ctx.options)
            o = o[:, None]
        else:
            o, matrix = gated_delta_rule(
                q,
                k,
                v,
                g,
                beta,
                initial_state=None if state is None else state.s,
                **ctx.padding,
                **ctx.options,
            )
        y = self.output(o, gate, ctx)
        return y, None if state is None else GDNState(conv_q, conv_k, conv_v, matrix)

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> GDNState:
        """Zeros; the size does not depend on capacity."""
        return GDNState(*self.conv_states(batch, dtype, mesh), self.matrix(batch, dtype, mesh))


def _rows(config: Backbone, sections: Sections) -> list[Row]:
    c = sections["gdn"]
    convs = "qkv" if c.use_short_conv else ""
    found = gated_linear_rows(config, c, decay="gk_proj", convs=convs, conv_bias=c.conv_bias)
    return found + rows.linear(state_heads(config), config.hidden_size, "b_proj")


def _base_rows(config: Backbone, sections: Sections, layout: str) -> list[Row]:
    """As the base models have them that have such layers.

    "packed": the rows of q, k, v and the output gate in one tensor, of both other gates in another,
    key head by key head with what belongs to it. "split": q, k and v in one, the gates apart.
    """
    d, heads, H = config.hidden_size, config.linear_heads, state_heads(config)
    D, taps = heads.dim, sections["gdn"].conv_size
    widths = {"q": heads.q * D, "k": heads.k * D, "v": heads.v * D}
    packed = layout == "packed"
    groups = heads.k if packed else 1
    qkv, z, b, a = ("qkvz", "qkvz", "ba", "ba") if packed else ("qkv", "z", "b", "a")

    def proj(n_out: int, name: str, path: str) -> list[Row]:
        return rows.linear(n_out, d, f"in_proj_{name}", path=path, groups=groups)

    return [
        *(row for s, width in widths.items() for row in proj(width, qkv, f"{s}_proj")),
        *proj(H * D, z, "g_proj"),
        *proj(H, b, "b_proj"),
        *proj(H, a, "gk_proj"),
        *(r for s, n in widths.items() for r in rows.conv(n, taps, "conv1d", path=f"{s}_conv1d")),
        *rows.vector(H, "A_log", "dt_bias"),
        Row("norm.weight", "o_norm.weight", (D,), "same"),
        *rows.linear(d, H * D, "out_proj", path="o_proj"),
    ]


GDN = Kind(
    symbol="GDN",
    label="Gated DeltaNet",
    name="gdn",
    make=lambda config, sections, *, dtype, rngs: GatedDeltaNet(
        config, sections["gdn"], dtype=dtype, rngs=rngs
    ),
    rows=_rows,
    section=Section(
        attribute="gdn",
        key="gdn_config",
        type=GDNConfig,
        geometry=geometry,
        defaults=defaults,
    ),
    aliases=("gdn", "gated_deltanet"),
    starts={BASE: lambda sections: FROM_ATTENTION},
    fuses=False,  # its transitions do not commute
    layer_type="linear_attention",
    base_name="linear_attn",
    base_rows=_base_rows,
)
