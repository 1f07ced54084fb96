"""B'MOJO-F: attention over a window of recent tokens and a second, older window of "fading" tokens.

The fading tokens are the outputs of an inner mixer (GKA, GDN or Mamba2). Query i sees the tokens
i-W+1 .. i as they are, and the fading versions of the tokens i-2W+1 .. i-W, under one softmax.
Source: B'MOJO, arXiv 2407.06324.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.convert import rows
from hmf_jax.convert.rows import Row
from hmf_jax.layers import linear, merge_heads, together
from hmf_jax.mixers.attention import (
    KV_DIMS,
    as_ring,
    chronological,
    composed_ring,
    head_norm,
    in_heads,
    o_rows,
    qkv_rows,
    refill,
    rotated,
    write,
)
from hmf_jax.mixers.base import Array, Context, Mixer, zeros
from hmf_jax.mixers.gdn import GDN
from hmf_jax.mixers.gka import GKA
from hmf_jax.mixers.kind import BASE, Kind, Section, Sections
from hmf_jax.mixers.mamba2 import M2
from hmf_jax.mixers.parts import Parts
from hmf_jax.options import LONGEST_WINDOW, Backbone, check_fields, shown
from hmf_jax.pallas_kernels import two_window_attention, two_window_decode

INNER = {kind.symbol: kind for kind in (M2, GDN, GKA)}  # what can make the fading tokens


@dataclasses.dataclass(frozen=True)
class BMojoConfig:
    """B'MOJO-F settings (`bmojo_config`); `ssm_mixer` is the layer symbol of the inner mixer."""

    window_size: int = 2048
    tie_attn_weights: bool = True
    ssm_mixer: str = "M2"

    def __post_init__(self) -> None:
        check_fields(self, {"window_size": (1, LONGEST_WINDOW)}, "bmojo_config.")
        if not isinstance(self.ssm_mixer, str) or self.ssm_mixer not in INNER:
            symbols = {name: kind.symbol for kind in INNER.values() for name in kind.aliases}
            given = self.ssm_mixer.lower() if isinstance(self.ssm_mixer, str) else ""
            symbol = symbols.get(given)
            if symbol is None:
                raise ValueError(
                    f"bmojo_config.ssm_mixer {shown(self.ssm_mixer)} is unknown; use one of "
                    f"{', '.join(sorted(symbols))}"
                )
            object.__setattr__(self, "ssm_mixer", symbol)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BMojoState:
    """B'MOJO-F: rings of W entries, and the state of the inner mixer.

    k, v [B, 2W, K, D] = [in-context ring (W) | readable fading ring (W)]; k_pending, v_pending
    [B, W, K, D] hold the fading keys and values that become readable W tokens later. In each ring
    token i sits in slot i mod W.
    """

    k: Array
    v: Array
    k_pending: Array
    v_pending: Array
    inner: Any


class TwoWindowAttention(nnx.Module):
    """Joint softmax over both windows. Untied weights (names ending in _) serve the fading one."""

    def __init__(self, config: Backbone, c: BMojoConfig, *, dtype, rngs: nnx.Rngs):
        d, nq, nk, bias = config.hidden_size, config.query_width, config.key_width, _bias(config)

        def proj(n: int, dim: str) -> nnx.Linear:
            return linear(d, n, ("embed", dim), config, dtype, rngs, bias)

        self.q_proj, self.q_norm = proj(nq, "heads"), head_norm(config, dtype)
        self.k_proj, self.k_norm = proj(nk, "kv_heads"), head_norm(config, dtype)
        self.v_proj = proj(nk, "kv_heads")
        self.o_proj = linear(nq, d, ("heads", "embed"), config, dtype, rngs, config.o_bias)
        if not c.tie_attn_weights:
            self.q_proj_, self.q_norm_ = proj(nq, "heads"), head_norm(config, dtype)
            self.k_proj_, self.k_norm_ = proj(nk, "kv_heads"), head_norm(config, dtype)
            self.v_proj_ = proj(nk, "kv_heads")
        self.tied, self.window, self.head_dim = c.tie_attn_weights, c.window_size, config.head_dim

    def __call__(
        self, x: Array, fading: Array, ctx: Context, state: BMojoState | None, inner
    ) -> tuple[Array, BMojoState | None]:
        """x, fading [B, T, d]; `inner` is the new state of the inner mixer."""
        D, tied = self.head_dim, self.tied
        q_fading = None
        if tied and x.shape[1] == 1:
            q = self.q_proj(x)
            # One token's products are as long as reading their weights takes: read them once.
            (k, k_fading), (v, v_fading) = together(
                jnp.stack([x, fading]), self.k_proj, self.v_proj
            )
        elif tied:
            q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
            k_fading, v_fading = together(fading, self.k_proj, self.v_proj)
        else:
            q, q_fading, k, v = together(x, self.q_proj, self.q_proj_, self.k_proj, self.v_proj)
            q_fading = rotated(in_heads(q_fading, ctx, D), self.q_norm_, ctx)
            k_fading, v_fading = together(fading, self.k_proj_, self.v_proj_)
        q = rotated(in_heads(q, ctx, D), self.q_norm, ctx)
        k = rotated(in_heads(k, ctx, D), self.k_norm, ctx)
        k_fading = rotated(in_heads(k_fading, ctx, D), self.k_norm if tied else self.k_norm_, ctx)
        v, v_fading = in_heads(v, ctx, D), in_heads(v_fading, ctx, D)
        attend = self._step if state is not None and x.shape[1] == 1 else self._prefill
        o, state = attend(q, k, v, q_fading, k_fading, v_fading, ctx, state, inner)
        return self.o_proj(merge_heads(ctx.over_tokens(o))), state

    def _prefill(self, q, k, v, q_fading, k_fading, v_fading, ctx: Context, state, inner):
        W = self.window

        def own_tokens() -> Array:
            return two_window_attention(
                q, k, v, k_fading, v_fading,
                window=W, q_fading=q_fading, segment_ids=ctx.segment_ids, lengths=ctx.lengths,
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
        used = jnp.where(active[:, 0], offset + 1, 0)  # a row without a token takes no time
        o = two_window_decode(
            q[:, 0],
            k_ring,
            v_ring,
            jnp.minimum(used, W),
            jnp.clip(used - W, 0, W),
            q_fading=None if q_fading is None else q_fading[:, 0],
            **ctx.options,
        )
        return o[:, None], BMojoState(k_ring, v_ring, k_pending, v_pending, inner)


class BMojo(Mixer):
    """An inner mixer makes the fading tokens; two-window attention reads them and x."""

    def __init__(self, config: Backbone, c: BMojoConfig, inner: Mixer, *, dtype, rngs: nnx.Rngs):
        self.inner = inner
        self.bmojo_attn = TwoWindowAttention(config, c, dtype=dtype, rngs=rngs)
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim

    def __call__(
        self, x: Array, ctx: Context, state: BMojoState | None = None
    ) -> tuple[Array, BMojoState | None]:
        fading, inner = self.inner(x, ctx=ctx, state=None if state is None else state.inner)
        return self.bmojo_attn(x, fading, ctx=ctx, state=state, inner=inner)

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> BMojoState:
        """Empty rings of W and 2W entries; the size does not depend on capacity."""
        W = self.bmojo_attn.window

        def ring(size: int) -> Array:
            shape = (batch, size, self.kv_heads, self.head_dim)
            return zeros(shape, KV_DIMS, dtype, mesh)

        inner = self.inner.init_state(batch, capacity, dtype, mesh)
        return BMojoState(ring(2 * W), ring(2 * W), ring(W), ring(W), inner)


def _bias(config: Backbone) -> bool:
    """Whether q, k and v have biases; o has where that of attention has."""
    return config.qkv_bias if config.bmojo_bias is None else config.bmojo_bias


def _inner(sections: Sections) -> Kind:
    return INNER[sections["bmojo"].ssm_mixer]


def _make(config: Backbone, sections: Sections, *, dtype, rngs: nnx.Rngs) -> BMojo:
    inner = _inner(sections).make(config, sections, dtype=dtype, rngs=rngs)
    return BMojo(config, sections["bmojo"], inner, dtype=dtype, rngs=rngs)


def _rows(config: Backbone, sections: Sections) -> list[Row]:
    inner, bias = _inner(sections), _bias(config)
    found = qkv_rows(config, bias=bias) + o_rows(config)
    if not sections["bmojo"].tie_attn_weights:
        found += qkv_rows(config, bias=bias, suffix="_")
    inner_rows = rows.under(inner.name, inner.rows(config, sections), "inner")
    return rows.under("bmojo_attn", found) + inner_rows


def _from_attention(sections: Sections) -> dict[str, str]:
    """Both windows start from the attention of the base, and so does the inner mixer."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    found = {f"bmojo_attn.{part}{suffix}": part for part in parts for suffix in ("", "_")}
    inner = _inner(sections).starts[BASE](sections)
    return found | {f"inner.{part}": source for part, source in inner.items()}


def _compose(parts: Parts, sections: Sections, state: Any, whole: Any) -> BMojoState:
    """Windows as those of attention, the inner mixer's state as its kind does it."""
    inner = _inner(sections).compose(parts, sections, state.inner, None)
    if whole is not None:
        return dataclasses.replace(whole, inner=inner)
    W = state.k_pending.shape[1]

    def fading(ring: Array, pending: Array) -> tuple[Array, Array]:
        """Readable and pending entries, the readable ones being W tokens older."""
        both = [chronological(r, parts.counts) for r in (ring[:, W:], pending)]
        both = parts.newest(jnp.concatenate(both, axis=1), 2 * W)
        return as_ring(both, parts.total, W, W), as_ring(both, parts.total, W, 0)

    (k, k_pending), (v, v_pending) = (
        fading(ring, pending)
        for ring, pending in ((state.k, state.k_pending), (state.v, state.v_pending))
    )
    k = jnp.concatenate([composed_ring(parts, state.k[:, :W]), k], axis=1)
    v = jnp.concatenate([composed_ring(parts, state.v[:, :W]), v], axis=1)
    return BMojoState(k, v, k_pending, v_pending, inner)


def _details(sections: Sections) -> str:
    c = sections["bmojo"]
    return f"window {c.window_size}, inner mixer {c.ssm_mixer}"


def _uses(sections: Sections, parameter: str) -> int:
    """With tied weights, the keys and values of both windows are projected by the same ones."""
    tied = sections["bmojo"].tie_attn_weights
    return 2 if tied and re.match(r"bmojo_attn\.[kv]_proj\.", parameter) else 1


BMF = Kind(
    symbol="BMF",
    label="B'MOJO-F",
    name="bmojo_f",
    make=_make,
    rows=_rows,
    section=Section(
        attribute="bmojo",
        key="bmojo_config",
        type=BMojoConfig,
        ask=(
            "the pattern has BMF layers: give their settings, bmojo={window_size, "
            "tie_attn_weights, ssm_mixer} (the released model: 2048, true, gka)"
        ),
        geometry=lambda config: {
            "hidden_size": config.hidden_size,
            "head_dim": config.head_dim,
            "num_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
        },
        derived=lambda config, layers: {"rms_norm_eps": config.rms_norm_eps},
        write=lambda c: {"ssm_mixer": INNER[c.ssm_mixer].aliases[0]},
    ),
    details=_details,
    inner=lambda sections: (sections["bmojo"].ssm_mixer,),
    starts={BASE: _from_attention},
    compose=_compose,
    fuses=True,  # the inner mixer is asked by itself
    sees=lambda sections, length: 2 * sections["bmojo"].window_size,
    uses=_uses,
)
