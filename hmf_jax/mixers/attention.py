"""Full causal attention ("*") and sliding-window attention ("SWA").

Grouped heads and RoPE; by the options of the backbone also QK-norm, biases, an output gate, and
queries that grow with the position.
"""

from __future__ import annotations

import dataclasses
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
    backbone_norm,
    linear,
    merge_heads,
    split_heads,
    together,
)
from hmf_jax.mixers.base import Array, Context, Mixer, zeros
from hmf_jax.mixers.kind import BASE, Kind, Section, Sections
from hmf_jax.mixers.parts import Parts
from hmf_jax.options import (
    LONGEST_WINDOW,
    Backbone,
    check_bool,
    check_fields,
    check_int,
    check_object,
)
from hmf_jax.pallas_kernels import attention, decode_attention, paged_decode_attention

KV_DIMS = ("batch", None, "kv_heads", None)


@dataclasses.dataclass(frozen=True)
class SWAConfig:
    """Sliding-window attention: query i sees the `window_size` keys (i - window_size, i]."""

    window_size: int = dataclasses.field(metadata={"example": "the original's example uses 512"})

    def __post_init__(self) -> None:
        check_fields(self, {"window_size": (1, LONGEST_WINDOW)}, "swa_config.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """Keys (after norm and RoPE) and values by token index: [B, capacity, K, D].

    In a state with pages (`ModelState.pages`): pools [P, page, K, D] of the pages of all rows.
    """

    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowState:
    """Ring of the last W keys and values, token i in slot i mod W: [B, W, K, D]."""

    k: Array
    v: Array


def write(buffer: Array, slots: Array, values: Array) -> Array:
    """buffer[b, slots[b, t]] = values[b, t]; slots outside the buffer [B, S, K, D] are dropped."""
    put = jax.vmap(lambda row, slot, value: row.at[slot].set(value, mode="drop"))
    return put(buffer, slots, values.astype(buffer.dtype))


def chronological(ring: Array, offset: Array) -> Array:
    """The entries of rings [B, W, K, D] (token i in slot i mod W) from the oldest to the newest."""
    size = ring.shape[1]
    slots = (offset[:, None] + jnp.arange(size)) % size
    return jnp.take_along_axis(ring, slots[:, :, None, None], axis=1)


def refill(tokens: Array, offset: Array, lengths: Array, skip: int, size: int, lag: int) -> Array:
    """Rings of `size` entries after `lengths` new tokens, filled from chronological tokens.

    Args:
      tokens: [B, skip + T, K, D]; entry j is token offset - skip + j.
      offset: [B] tokens before this call.
      lengths: [B] new tokens of each row.
      skip: past tokens that `tokens` starts with; at least size + lag.
      size: entries of a ring.
      lag: the ring ends this many tokens before the newest one.
    """
    end = (offset + lengths - lag)[:, None]  # the ring holds tokens end - size .. end - 1
    token = end - size + (jnp.arange(size) - (end - size)) % size
    entry = token - offset[:, None] + skip
    return jnp.take_along_axis(tokens, entry[:, :, None, None], axis=1)


def in_heads(x: Array, ctx: Context, D: int) -> Array:
    """What a projection made, [B, T, H * D], as heads [B, T, H, D]."""
    return split_heads(ctx.over_tokens(x), D)


def rotated(heads: Array, norm: RMSNorm | None, ctx: Context) -> Array:
    """Queries or keys [B, T, H, D]: normalised if there is a norm, then rotated."""
    return apply_rope(heads if norm is None else norm(heads), ctx.rope)


def head_norm(config: Backbone, dtype) -> RMSNorm | None:
    """The norm of queries or of keys, where the backbone has one."""
    return backbone_norm(config.head_dim, config, dtype) if config.qk_norm else None


class Attention(Mixer):
    """Softmax attention over all earlier tokens, or over the last `window` ones.

    Keys are cached after norm and RoPE. Without a window the cache has one entry per token; with
    a window W it is a ring of W entries and query i sees keys i-W+1 .. i. With an output gate,
    q_proj makes of each head its query, then its gate.
    """

    def __init__(self, config: Backbone, *, dtype, rngs: nnx.Rngs, window: int | None = None):
        d, D = config.hidden_size, config.head_dim
        nq, nk, bias = config.query_width, config.key_width, config.qkv_bias
        gated = 2 * nq if config.output_gate else nq
        self.q_proj = linear(d, gated, ("embed", "heads"), config, dtype, rngs, bias)
        self.k_proj = linear(d, nk, ("embed", "kv_heads"), config, dtype, rngs, bias)
        self.v_proj = linear(d, nk, ("embed", "kv_heads"), config, dtype, rngs, bias)
        self.o_proj = linear(nq, d, ("heads", "embed"), config, dtype, rngs, config.o_bias)
        self.q_norm, self.k_norm = head_norm(config, dtype), head_norm(config, dtype)
        self.kv_heads, self.head_dim, self.window = config.num_key_value_heads, D, window
        self.gated = config.output_gate

    def __call__(
        self, x: Array, ctx: Context, state: AttentionState | WindowState | None = None
    ) -> tuple[Array, AttentionState | WindowState | None]:
        D, gate = self.head_dim, None
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        q = in_heads(q, ctx, 2 * D if self.gated else D)
        if self.gated:
            q, gate = jnp.split(q, 2, axis=-1)
        q = rotated(q, self.q_norm, ctx)
        if ctx.query_scale is not None:
            q = q * ctx.query_scale.astype(q.dtype)
        k = rotated(in_heads(k, ctx, D), self.k_norm, ctx)
        v = in_heads(v, ctx, D)
        attend = self._full if self.window is None else self._windowed
        o, state = attend(q, k, v, ctx, state)
        o = ctx.over_tokens(o)
        if gate is not None:
            o = o * jax.nn.sigmoid(gate)
        return self.o_proj(merge_heads(o)), state

    def _own_tokens(self, q: Array, k: Array, v: Array, ctx: Context) -> Array:
        """Attention among the tokens of this call, which are whole sequences."""
        return attention(
            q,
            k,
            v,
            window=self.window,
            segment_ids=ctx.segment_ids,
            lengths=ctx.lengths,
            **ctx.options,
        )

    def _full(self, q, k, v, ctx: Context, state):
        if state is None:
            return self._own_tokens(q, k, v, ctx), None
        if ctx.pages is not None:
            return self._paged(q, k, v, ctx, state)
        T, capacity = q.shape[1], state.k.shape[1]
        lengths = ctx.counts(T)
        step = jnp.arange(T)
        slots = jnp.where(step < lengths[:, None], ctx.offset[:, None] + step, capacity)
        state = AttentionState(write(state.k, slots, k), write(state.v, slots, v))
        if T == 1:
            keys = jnp.minimum(ctx.offset + lengths, capacity)
            o = decode_attention(q[:, 0], state.k, state.v, keys, **ctx.options)[:, None]
        elif ctx.fresh:
            o = self._own_tokens(q, k, v, ctx)
        else:
            o = attention(q, state.k, state.v, offset=ctx.offset, **ctx.options)
        return o, state

    def _paged(self, q, k, v, ctx: Context, state):
        pages, T = ctx.pages, q.shape[1]
        assert pages is not None
        lengths = ctx.counts(T)
        step = jnp.arange(T)
        slots = jnp.where(step < lengths[:, None], ctx.offset[:, None] + step, -1)
        state = AttentionState(pages.write(state.k, slots, k), pages.write(state.v, slots, v))
        held = ctx.offset + lengths
        if T == 1:
            held = jnp.where(lengths > 0, held, 0)  # a row without a token takes no time
            o = paged_decode_attention(q[:, 0], state.k, state.v, pages, held, **ctx.options)
            return o[:, None], state
        if ctx.fresh:
            return self._own_tokens(q, k, v, ctx), state

        def among_all() -> Array:
            keys, values = pages.read(state.k, held), pages.read(state.v, held)
            return attention(q, keys, values, offset=ctx.offset, **ctx.options)

        begin = jnp.all(ctx.offset == 0)
        return jax.lax.cond(begin, lambda: self._own_tokens(q, k, v, ctx), among_all), state

    def _windowed(self, q, k, v, ctx: Context, state):
        if state is None:
            return self._own_tokens(q, k, v, ctx), None
        T, W = q.shape[1], state.k.shape[1]
        lengths = ctx.counts(T)
        if T == 1:
            slots = jnp.where(lengths > 0, ctx.offset % W, W)[:, None]
            state = WindowState(write(state.k, slots, k), write(state.v, slots, v))
            # A row without a token takes no time.
            keys = jnp.where(lengths > 0, jnp.minimum(ctx.offset + lengths, W), 0)
            return decode_attention(q[:, 0], state.k, state.v, keys, **ctx.options)[:, None], state
        keys = jnp.concatenate([chronological(state.k, ctx.offset), k], axis=1)
        values = jnp.concatenate([chronological(state.v, ctx.offset), v], axis=1)
        if ctx.fresh:
            o = self._own_tokens(q, k, v, ctx)
        else:
            o = attention(q, keys, values, window=W, offset=ctx.offset, past=W, **ctx.options)
        ring = [refill(t, ctx.offset, lengths, W, W, 0) for t in (keys, values)]
        return o, WindowState(*ring)

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> AttentionState | WindowState:
        """Empty caches: [B, capacity, K, D], or rings [B, W, K, D] (never more than capacity)."""
        cls = AttentionState if self.window is None else WindowState
        size = capacity if self.window is None else self.window
        shape = (batch, size, self.kv_heads, self.head_dim)
        return cls(zeros(shape, KV_DIMS, dtype, mesh), zeros(shape, KV_DIMS, dtype, mesh))


def qkv_rows(config: Backbone, *, bias: bool, gate: bool = False, suffix: str = "") -> list[Row]:
    """Projections and norms of q (with a gate: of both, head by head), k and v; `suffix` ends
    their names."""
    d, nq, nk = config.hidden_size, config.query_width, config.key_width
    nq = 2 * nq if gate else nq
    found = [
        *rows.linear(nq, d, f"q_proj{suffix}", bias),
        *rows.linear(nk, d, f"k_proj{suffix}", bias),
        *rows.linear(nk, d, f"v_proj{suffix}", bias),
    ]
    if config.qk_norm:
        found += rows.vector(config.head_dim, f"q_norm{suffix}.weight", f"k_norm{suffix}.weight")
    return found


def o_rows(config: Backbone) -> list[Row]:
    """The output projection."""
    return rows.linear(config.hidden_size, config.query_width, "o_proj", config.o_bias)


def _rows(config: Backbone, sections: Sections) -> list[Row]:
    return qkv_rows(config, bias=config.qkv_bias, gate=config.output_gate) + o_rows(config)


def as_ring(tokens: Array, total: Array, size: int, lag: int) -> Array:
    """The ring of `size` entries of a row of `total` tokens [1], from its newest tokens."""
    return refill(tokens, total, jnp.zeros_like(total), tokens.shape[1], size, lag)


def composed_ring(parts: Parts, ring: Array) -> Array:
    """One ring [1, W, K, D] of the rings [N, W, K, D] that the parts left behind."""
    W = ring.shape[1]
    return as_ring(parts.newest(chronological(ring, parts.counts), W), parts.total, W, 0)


def _compose_full(parts: Parts, sections: Sections, state: Any, whole: Any) -> AttentionState:
    return whole or AttentionState(parts.gather(state.k), parts.gather(state.v))


def _compose_windows(parts: Parts, sections: Sections, state: Any, whole: Any) -> WindowState:
    return whole or WindowState(composed_ring(parts, state.k), composed_ring(parts, state.v))


def _make_windowed(config: Backbone, sections: Sections, *, dtype, rngs: nnx.Rngs) -> Mixer:
    return Attention(config, dtype=dtype, rngs=rngs, window=sections["swa"].window_size)


def _take_window(top: dict[str, Any]) -> dict[str, Any] | None:
    """swa_config, or else the window that the base model has (use_sliding_window)."""
    window = base_window(top)
    for key in ("sliding_window", "use_sliding_window", "max_window_layers"):
        top.pop(key, None)
    stored = check_object("swa_config", top.pop("swa_config", None)) or {}
    if stored.get("window_size", window) is None:
        return {k: v for k, v in stored.items() if k != "window_size"} or None
    return {"window_size": window, **stored}


def base_window(top: Mapping[str, Any]) -> int | None:
    """The window that a base model's config.json switches on, or None."""
    used, window = top.get("use_sliding_window"), top.get("sliding_window")
    if used is not None:
        check_bool("use_sliding_window", used)
    if (first := top.get("max_window_layers")) is not None:
        check_int("max_window_layers", first, 0)
    if window is not None:  # where it is switched off, files also say 0
        check_int("sliding_window", window, 1 if used else 0, LONGEST_WINDOW if used else None)
    return window if used else None


FULL = Kind(
    symbol=BASE,
    label="full attention",
    name="self_attn",
    make=lambda config, sections, *, dtype, rngs: Attention(config, dtype=dtype, rngs=rngs),
    rows=_rows,
    compose=_compose_full,
    fuses=True,
    sees=lambda sections, length: length,
    appends=("k", "v"),
    layer_type="full_attention",
)
WINDOWED = Kind(
    symbol="SWA",
    label="sliding-window attention",
    name="swa",
    make=_make_windowed,
    rows=_rows,
    section=Section(
        attribute="swa",
        key="swa_config",
        type=SWAConfig,
        missing=(
            "the pattern has SWA layers but no window: set swa_config.window_size "
            "(the original's layer-selection recipe uses 2048)"
        ),
        take=_take_window,
    ),
    details=lambda sections: f"window {sections['swa'].window_size}",
    like=BASE,
    compose=_compose_windows,
    fuses=True,
    sees=lambda sections, length: sections["swa"].window_size,
    layer_type="sliding_attention",
    base_keys=lambda sections: {
        "use_sliding_window": True,
        "sliding_window": sections["swa"].window_size,
    },
)
