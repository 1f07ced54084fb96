"""A kind of layer in one file: a gated exponential moving average, "EMA".

It has everything that a kind has: settings, a state, parameters in checkpoints, a mixer. One line
makes it known to the whole library (tests/test_kinds.py):

    KINDS["EMA"] = toy_kind.EMA
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.convert import rows
from hmf_jax.convert.rows import Row
from hmf_jax.layers import exact, exact_dtype, linear
from hmf_jax.mixers import Context, Kind, Mixer, Section, Sections
from hmf_jax.mixers.base import Array, zeros
from hmf_jax.options import Backbone


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """Settings (`ema_config` in config.json)."""

    use_gate: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EMAState:
    """The average so far: float32 [B, C]."""

    average: Array


class MovingAverage(Mixer):
    """h_t = a h_(t-1) + (1 - a) u_t per channel; a = sigmoid(decay), u = in_proj(x)."""

    def __init__(self, config: Backbone, c: EMAConfig, *, dtype, rngs: nnx.Rngs):
        d, C = config.hidden_size, config.query_width
        self.in_proj = linear(d, C, ("embed", "heads"), config, dtype, rngs)
        self.gate_proj = (
            linear(d, C, ("embed", "heads"), config, dtype, rngs) if c.use_gate else None
        )
        self.decay = nnx.Param(jnp.full(C, 2.0, dtype), dims=("heads",))
        self.out_proj = linear(C, d, ("heads", "embed"), config, dtype, rngs)
        self.channels = C

    def __call__(
        self, x: Array, ctx: Context, state: EMAState | None = None
    ) -> tuple[Array, EMAState | None]:
        u, a = exact(self.in_proj(x)), jax.nn.sigmoid(exact(self.decay[...]))
        keep, new = jnp.broadcast_to(a, u.shape), (1 - a) * u
        if ctx.segment_ids is not None:  # packed documents begin at zero
            first = ctx.segment_ids != jnp.roll(ctx.segment_ids, 1, axis=1)
            keep = jnp.where(first.at[:, 0].set(False)[..., None], 0.0, keep)
        keep, new = 1 - ctx.mask(1 - keep), ctx.mask(new)  # padding changes nothing

        def follow(one, two):
            return one[0] * two[0], two[0] * one[1] + two[1]

        kept, h = jax.lax.associative_scan(follow, (keep, new), axis=1)
        if state is not None:
            h = h + kept * state.average[:, None]
        y = h.astype(x.dtype)
        y = self.out_proj(y if self.gate_proj is None else y * jax.nn.silu(self.gate_proj(x)))
        return y, None if state is None else EMAState(h[:, -1])

    def init_state(self, batch: int, capacity: int, dtype, mesh) -> EMAState:
        """Zeros; the size does not depend on capacity."""
        return EMAState(zeros((batch, self.channels), ("batch", "heads"), exact_dtype(dtype), mesh))


def _make(config: Backbone, sections: Sections, *, dtype, rngs: nnx.Rngs) -> Mixer:
    return MovingAverage(config, sections["ema"], dtype=dtype, rngs=rngs)


def _rows(config: Backbone, sections: Sections) -> list[Row]:
    d, C = config.hidden_size, config.query_width
    found = [
        *rows.linear(C, d, "in_proj"),
        *rows.vector(C, "decay"),
        *rows.linear(d, C, "out_proj"),
    ]
    return found + rows.linear(C, d, "gate_proj") if sections["ema"].use_gate else found


EMA = Kind(
    symbol="EMA",
    label="exponential moving average",
    name="ema",
    make=_make,
    rows=_rows,
    section=Section(attribute="ema", key="ema_config", type=EMAConfig),
    details=lambda sections: "gated" if sections["ema"].use_gate else "not gated",
)
