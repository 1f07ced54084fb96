"""B'MOJO-F: attention over a window of recent tokens and a second, older window of "fading" tokens.

The fading tokens are the outputs of an inner mixer (GKA, GDN or Mamba2). Query i sees the tokens
i-W+1 .. i as they are, and the fading versions of the tokens i-2W+1 .. i-W, under one softmax.
Source: B'MOJO, arXiv 2407.06324.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from hmf_jax.config import HybridConfig
from hmf_jax.layers import RMSNorm, linear, merge_heads
from hmf_jax.mixers.attention import KV_DIMS, chronological, project, refill, write
from hmf_jax.mixers.base import Array, Context, Mixer, zeros
from hmf_jax.pallas_kernels import two_window_attention, two_window_decode
from hmf_jax.state import BMojoState


class TwoWindowAttention(nnx.Module):
    """Joint softmax over both windows. Untied weights (names ending in _) serve the fading one."""

    def __init__(self, config: HybridConfig, *, dtype, rngs: nnx.Rngs):
        c = config.bmojo
        assert c is not None
        d, D = config.hidden_size, config.head_dim
        nq, nk = config.num_attention_heads * D, config.num_key_value_heads * D
        bias, eps = config.attention_bias, config.rms_norm_eps

        def proj(n: int, dim: str) -> nnx.Linear:
            return linear(d, n, ("embed", dim), config, dtype, rngs, bias)

        self.q_proj, self.q_norm = proj(nq, "heads"), RMSNorm(D, eps, dtype)
        self.k_proj, self.k_norm = proj(nk, "kv_heads"), RMSNorm(D, eps, dtype)
        self.v_proj = proj(nk, "kv_heads")
        self.o_proj = linear(nq, d, ("heads", "embed"), config, dtype, rngs, bias)
        if not c.tie_attn_weights:
            self.q_proj_, self.q_norm_ = proj(nq, "heads"), RMSNorm(D, eps, dtype)
            self.k_proj_, self.k_norm_ = proj(nk, "kv_heads"), RMSNorm(D, eps, dtype)
            self.v_proj_ = proj(nk, "kv_heads")
        self.tied, self.window, self.head_dim = c.tie_attn_weights, c.window_size, D

    def __call__(
        self, x: Array, fading: Array, ctx: Context, state: BMojoState | None, inner
    ) -> tuple[Array, BMojoState | None]:
        """x, fading [B, T, d]; `inner` is the new state of the inner mixer."""
        D, tied = self.head_dim, self.tied
        q = project(x, self.q_proj, self.q_norm, ctx, D, rotate=True)
        q_fading = None
        if not tied:
            q_fading = project(x, self.q_proj_, self.q_norm_, ctx, D, rotate=True)
        if tied and x.shape[1] == 1:
            # One token's products are as long as reading their weights takes: read them once.
            both = jnp.stack([x, fading])
            k, k_fading = project(both, self.k_proj, self.k_norm, ctx, D, rotate=True)
            v, v_fading = project(both, self.v_proj, None, ctx, D, rotate=False)
        else:
            k = project(x, self.k_proj, self.k_norm, ctx, D, rotate=True)
            v = project(x, self.v_proj, None, ctx, D, rotate=False)
            k_proj, k_norm = (self.k_proj, self.k_norm) if tied else (self.k_proj_, self.k_norm_)
            v_proj = self.v_proj if tied else self.v_proj_
            k_fading = project(fading, k_proj, k_norm, ctx, D, rotate=True)
            v_fading = project(fading, v_proj, None, ctx, D, rotate=False)
        attend = self._step if state is not None and x.shape[1] == 1 else self._prefill
        o, state = attend(q, k, v, q_fading, k_fading, v_fading, ctx, state, inner)
        return self.o_proj(merge_heads(ctx.over_tokens(o))), state

    def _prefill(self, q, k, v, q_fading, k_fading, v_fading, ctx: Context, state, inner):
        W = self.window

        def own_tokens() -> Array:
            packed = ctx.segment_ids if state is None else None  # with a state: padding only
            return two_window_attention(
                q, k, v, k_fading, v_fading,
                window=W, q_fading=q_fading, segment_ids=packed, kv_lengths=ctx.lengths,
                **ctx.options,
            )  # fmt: skip

        if state is None:
            return own_tokens(), None
        offset, lengths = ctx.offset, ctx.counts(q.shape[1])

        def with_past(ring: Array, pending: Array, new: Array, new_fading: Array):
            recent, readable = (
                chronological(ring[:, :W], offset),
                chronological(ring[:, W:], offset),
            )
            older = [readable, chronological(pending, offset), new_fading]
            return jnp.concatenate([recent, new], axis=1), jnp.concatenate(older, axis=1)

        keys, fading_keys = with_past(state.k, state.k_pending, k, k_fading)
        values, fading_values = with_past(state.v, state.v_pending, v, v_fading)
        if ctx.fresh:
            o = own_tokens()
        else:
            o = two_window_attention(
                q, keys, values, fading_keys, fading_values,
                window=W, q_fading=q_fading, offset=offset, **ctx.options,
            )  # fmt: skip

        def rings(tokens: Array, fading_tokens: Array) -> tuple[Array, Array]:
            recent = refill(tokens, offset, lengths, W, W, 0)
            readable = refill(fading_tokens, offset, lengths, 2 * W, W, W)
            pending = refill(fading_tokens, offset, lengths, 2 * W, W, 0)
            return jnp.concatenate([recent, readable], axis=1), pending

        k_ring, k_pending = rings(keys, fading_keys)
        v_ring, v_pending = rings(values, fading_values)
        return o, BMojoState(k_ring, v_ring, k_pending, v_pending, inner)

    def _step(self, q, k, v, q_fading, k_fading, v_fading, ctx: Context, state, inner):
        W, offset = self.window, ctx.offset
        slot = (offset % W)[:, None]
        active = (ctx.counts(1) > 0)[:, None]

        def push(ring: Array, pending: Array, new: Array, new_fading: Array):
            """The pending token in this slot is W tokens old now: it becomes readable."""
            ripe = jnp.take_along_axis(pending, slot[:, :, None, None], axis=1)
            slots = jnp.where(active, jnp.concatenate([slot, slot + W], axis=1), 2 * W)
            ring = write(ring, slots, jnp.concatenate([new, ripe], axis=1))
            return ring, write(pending, jnp.where(active, slot, W), new_fading)

        k_ring, k_pending = push(state.k, state.k_pending, k, k_fading)
        v_ring, v_pending = push(state.v, state.v_pending, v, v_fading)
        o = two_window_decode(
            q[:, 0],
            k_ring,
            v_ring,
            jnp.minimum(offset + 1, W),
            jnp.clip(offset - W + 1, 0, W),
            q_fading=None if q_fading is None else q_fading[:, 0],
            **ctx.options,
        )
        return o[:, None], BMojoState(k_ring, v_ring, k_pending, v_pending, inner)


class BMojo(Mixer):
    """An inner mixer makes the fading tokens; two-window attention reads them and x."""

    def __init__(self, config: HybridConfig, inner, *, dtype, rngs: nnx.Rngs):
        self.inner = inner(config, dtype=dtype, rngs=rngs)
        self.bmojo_attn = TwoWindowAttention(config, dtype=dtype, rngs=rngs)
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim

    def __call__(
        self, x: Array, ctx: Context, state: BMojoState | None = None
    ) -> tuple[Array, BMojoState | None]:
        fading, inner = self.inner(x, ctx, None if state is None else state.inner)
        return self.bmojo_attn(x, fading, ctx, state, inner)

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> BMojoState:
        """Empty rings of W and 2W entries; the size does not depend on capacity."""
        W = self.bmojo_attn.window

        def ring(size: int) -> Array:
            shape = (batch, size, self.kv_heads, self.head_dim)
            return zeros(shape, KV_DIMS, dtype, mesh)

        inner = self.inner.init_state(batch, capacity, dtype, mesh)
        return BMojoState(ring(2 * W), ring(2 * W), ring(W), ring(W), inner)
