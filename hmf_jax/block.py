"""A layer: one mixer and one MLP (or experts), each behind a norm, added to what came in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from hmf_jax.config import HybridConfig
from hmf_jax.layers import MLP, backbone_norm, untabulated
from hmf_jax.mixers import Context, Mixer, make_mixer, split_symbol
from hmf_jax.moe import MoE, Routing
from hmf_jax.sharding import constrain
from hmf_jax.state import with_pools

Array = jax.Array


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    A fused block (stage 1 of priming) also holds the mixer that its own one is to learn from; the
    model does not run it, `hmf_jax.priming` does. In a sparse block the MLP is a `MoE`.
    """

    def __init__(
        self, symbol: str, config: HybridConfig, *, sparse: bool = False, dtype, rngs: nnx.Rngs
    ):
        def mixer(kind: str) -> Mixer:
            return make_mixer(kind, config, config.sections, dtype=dtype, rngs=rngs)

        kind, teacher = split_symbol(symbol)
        self.input_layernorm = backbone_norm(config.hidden_size, config, dtype)
        self.mixer = mixer(kind)
        self.post_attention_layernorm = backbone_norm(config.hidden_size, config, dtype)
        self.mlp = (MoE if sparse else MLP)(config, dtype, rngs)
        self.teacher = None if teacher is None else mixer(teacher)

    def __call__(
        self, x: Array, ctx: Context, state: Any, experts: Array | None = None
    ) -> tuple[Array, Array, Any, dict[str, Array] | None]:
        """x [B, T, d] -> (the hidden states after the block, the mixer's output, new state, what
        the router of a sparse block decided, see `MoE.__call__`).

        `experts`: see `MoE.__call__`.
        """
        x, mixed, _, state, routing = self.run(self.mixer, x, ctx, state, experts)
        return x, mixed, state, routing

    def init_state(
        self, batch: int, capacity: int, pages: Any, names: Sequence[str], dtype: Any, mesh: Any
    ) -> Any:
        """The mixer's empty state; with `pages` (P, page), these arrays of it are pools."""
        state = self.mixer.init_state(batch, capacity, dtype, mesh)
        if not pages:
            return state
        return with_pools(state, self.mixer.init_state(pages[0], pages[1], dtype, mesh), names)

    @untabulated
    def run(
        self, mixer: Mixer, x: Array, ctx: Context, state: Any = None, experts: Array | None = None
    ) -> tuple[Array, Array, Array, Any, dict[str, Array] | None]:
        """The block with this mixer: (hidden states, mixer's output, MLP's output, new state, what
        the router decided)."""
        h, x = self.input_layernorm.joined(x, None, **ctx.options)
        mixed, state = mixer(h, ctx=ctx, state=state)
        mixed = constrain(mixed, ctx.mesh, "batch", "tokens", None)
        h, x = self.post_attention_layernorm.joined(x, mixed, **ctx.options)
        if isinstance(self.mlp, MoE):
            fed, routing = self.mlp(h, ctx=ctx, experts=experts)
        else:
            fed, routing = self.mlp(h), None
        return constrain(x + fed, ctx.mesh, "batch", "tokens", None), mixed, fed, state, routing


class LayerOutput(NamedTuple):
    """What one layer made of its input: the output of its mixer (`mixed`) and its own (`x`, which
    the next layer reads), both [B, T, d], its new state (None without one), and what its router
    decided (None in a dense layer)."""

    mixed: Array
    x: Array
    state: Any
    routing: Routing | None


@jax.jit
def run_block(
    block: Block, x: Array, ctx: Context, state: Any, experts: Array | None = None
) -> tuple[Array, Array, Any, dict[str, Array] | None]:
    """One inner jit: layers of the same kind have equal tree structures and are traced once."""
    return block(x, ctx=ctx, state=state, experts=experts)
