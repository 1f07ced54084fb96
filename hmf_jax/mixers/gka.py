"""Gated KalmaNet (GKA): linear attention whose query solves a ridge regression over past keys."""

from __future__ import annotations

import jax
from flax import nnx

from hmf_jax.config import GKAConfig, HybridConfig
from hmf_jax.layers import exact, linear, log_decay, split_heads
from hmf_jax.mixers.base import Array, Context
from hmf_jax.mixers.linear import GatedLinearMixer, l2_normalize
from hmf_jax.pallas_kernels import gka, gka_step
from hmf_jax.state import GKAState


class GatedKalmaNet(GatedLinearMixer):
    """Projections, short convolutions, gates, then the operator `pallas_kernels.gka`.

    Source: Gated KalmaNet, arXiv 2511.21016. The log-decay and both gates are float32. The key
    covariance is kept up to date even with num_iter = 0, so num_iter may change between calls.
    """

    c: GKAConfig

    def __init__(self, config: HybridConfig, *, dtype, rngs: nnx.Rngs):
        c = config.gka
        assert c is not None
        convs = (True, True, c.use_v_conv)
        super().__init__(config, c, dtype=dtype, rngs=rngs, convs=convs)

        def gate(bias: bool) -> nnx.Linear:
            d, H = config.hidden_size, config.num_attention_heads
            return linear(d, H, ("embed", "heads"), config, dtype, rngs, bias)

        self.a_proj = gate(bias=False)
        self.b_proj = gate(bias=True) if c.use_beta_gate else None
        self.alpha_proj = gate(bias=True) if c.use_alpha_connection else None

    def __call__(
        self, x: Array, ctx: Context, state: GKAState | None = None
    ) -> tuple[Array, GKAState | None]:
        c, s = self.c, state
        q, conv_q = self.convolve(self.q_proj(x), self.q_conv1d, ctx, s and s.conv_q, silu=True)
        k, conv_k = self.convolve(self.k_proj(x), self.k_conv1d, ctx, s and s.conv_k, silu=True)
        v, conv_v = self.convolve(self.v_proj(x), self.v_conv1d, ctx, s and s.conv_v, silu=False)
        q = l2_normalize(split_heads(q, self.head_dim), 1e-6, under_root=False)
        k = l2_normalize(self.expand(k, self.proj_k, self.k_rep), 1e-6, under_root=False)
        v = self.expand(v, self.proj_v, self.v_rep)
        q, k = q.astype(v.dtype), k.astype(v.dtype)

        alpha = beta = g = None
        if self.alpha_proj is not None:
            alpha = jax.nn.sigmoid(exact(ctx.over_tokens(self.alpha_proj(x))))
        if self.b_proj is not None:
            beta = jax.nn.sigmoid(exact(ctx.over_tokens(self.b_proj(x)))) + 1e-6
        if c.use_forgetting_gate:
            g = log_decay(self.A_log[...], ctx.over_tokens(self.a_proj(x)), self.dt_bias[...])[1]

        options = {
            "num_iter": c.num_iter if ctx.num_iter is None else ctx.num_iter,
            "ridge": c.ridge_strength,
            "scale": None if c.gla_rescale else 1.0,
            "decay_kk": c.use_forgetting_gate_kk,
            **ctx.options,
        }
        if state is not None and x.shape[1] == 1:
            alpha, g, beta = (None if a is None else ctx.mask(a)[:, 0] for a in (alpha, g, beta))
            k, v = ctx.mask(k)[:, 0], ctx.mask(v)[:, 0]
            o, h = gka_step(q[:, 0], k, v, alpha, g, beta, (state.h_kk, state.h_kv), **options)
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
                segment_ids=ctx.segment_ids,
                chunk_size=c.chunk_size,
                **options,
            )
        y = self.output(o, x, ctx)
        return y, None if state is None else GKAState(conv_q, conv_k, conv_v, *h)

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> GKAState:
        """Zeros; the size does not depend on capacity."""
        convs = self.conv_states(batch, dtype, mesh)
        return GKAState(*convs, self.matrix(batch, dtype, mesh), self.matrix(batch, dtype, mesh))
