"""Mamba2 with attention-shaped projections (x = V, B = K, C = Q): the state space dual, SSD."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from hmf_jax.config import HybridConfig
from hmf_jax.layers import (
    GatedGroupNorm,
    RMSNorm,
    apply_rope,
    decay_params,
    exact_dtype,
    linear,
    log_decay,
    merge_heads,
    split_heads,
)
from hmf_jax.mixers.base import Array, Context, Mixer, zeros
from hmf_jax.mixers.linear import ShortConv
from hmf_jax.pallas_kernels import ssd, ssd_step
from hmf_jax.state import Mamba2State

CONV_SIZE = 4


class Mamba2(Mixer):
    """Projections, norms on B and C, short convolutions, then the operator `pallas_kernels.ssd`.

    Source: Mamba-2, arXiv 2405.21060. H heads of state [P, N] = [head_dim, head_dim]; x and B have
    the key/value heads and are shared by groups of query heads. The blocks of the checkpoint's
    merged in_proj (z | x | B | C | dt) and conv1d (x | B | C) are separate parameters here, so
    that each one is split over devices by its own heads.
    """

    def __init__(self, config: HybridConfig, *, dtype, rngs: nnx.Rngs):
        c = config.mamba2
        assert c is not None
        d, D = config.hidden_size, config.head_dim
        H, Hkv = config.num_attention_heads, config.num_key_value_heads
        nq, nk = H * D, Hkv * D
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
        self.B_norm = RMSNorm(D, 1e-6, dtype) if c.use_qk_norm else None
        self.C_norm = RMSNorm(D, 1e-6, dtype) if c.use_qk_norm else None
        self.norm = GatedGroupNorm(nq, 1e-5, dtype)
        self.out_proj = linear(nq, d, ("heads", "embed"), config, dtype, rngs)
        self.head_dim, self.heads, self.use_rope = D, H, c.use_pos_emb

    def __call__(
        self, x: Array, ctx: Context, state: Mamba2State | None = None
    ) -> tuple[Array, Mamba2State | None]:
        def heads(a: Array) -> Array:
            return split_heads(a, self.head_dim)

        def key_like(proj: nnx.Linear, norm: RMSNorm | None) -> Array:
            a = heads(proj(x))
            a = a if norm is None else norm(a)
            return merge_heads(apply_rope(a, ctx.rope) if self.use_rope else a)

        s = state
        u, conv_x = self.x_conv1d(self.x_proj(x), ctx, s and s.conv_x)
        B, conv_B = self.B_conv1d(key_like(self.B_proj, self.B_norm), ctx, s and s.conv_B)
        C, conv_C = self.C_conv1d(key_like(self.C_proj, self.C_norm), ctx, s and s.conv_C)
        u, B, C = heads(u), heads(B), heads(C)
        A = -jnp.exp(self.A_log[...])
        dt, _ = log_decay(self.A_log[...], ctx.over_tokens(self.dt_proj(x)), self.dt_bias[...])
        dt = ctx.mask(dt)

        if state is not None and x.shape[1] == 1:
            u, B, C, dt_now = (a[:, 0] for a in (ctx.mask(u), B, C, dt))
            y, matrix = ssd_step(u, B, C, dt_now, A, self.D[...], state.s, **ctx.options)
            y = y[:, None]
        else:
            y, matrix = ssd(
                u,
                B,
                C,
                dt,
                A,
                self.D[...],
                initial_state=None if state is None else state.s,
                segment_ids=ctx.segment_ids,
                **ctx.options,
            )
        y = self.out_proj(merge_heads(self.norm(ctx.over_tokens(y), heads(self.z_proj(x)))))
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
