"""A mixture of experts: a router sends each token to a few MLPs of many.

Shapes: B batch, T tokens, N = B T, d hidden, E experts, k experts of a token, F width of an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.layers import MLP, Dims, exact, one_row_twice
from hmf_jax.mixers.base import Context
from hmf_jax.options import Backbone, MoEConfig
from hmf_jax.pallas_kernels import grouped_matmul
from hmf_jax.pallas_kernels.dispatch import PRODUCT, kept
from hmf_jax.pallas_kernels.sharded import AXES, call

Array = jax.Array

# Dimension name -> its letter in `sharded.call`.
_LETTERS = {"experts": "E", "mlp": "E", "embed": "f", None: "-"}


class Routing(NamedTuple):
    """What the router of a layer decided, tokens in the order of the layer (valid ones first).

    Attributes:
      logits: [B, T, E], dtype of the model; padding has some, too.
      experts: [B, T, k] int32, those of each token, the one of the largest logit first.
      chosen: [k, E] float32, how many valid tokens have each expert in each slot.
      probability: [E] float32, the sum over valid tokens of softmax(logits).
    """

    logits: Array
    experts: Array
    chosen: Array
    probability: Array


def load_balancing_loss(routings: Sequence[Routing]) -> Array:
    """E * sum_ke f_ke P_e over the tokens of all these layers, float32; k if all experts are used
    alike (Fedus et al. 2021, arXiv 2101.03961).

    f_ke is the fraction of tokens that have expert e in slot k, P_e the mean of its probability.
    Padding does not count; without any token the loss is 0.
    """
    chosen = jnp.sum(jnp.stack([r.chosen for r in routings]), axis=0)
    probability = jnp.sum(jnp.stack([r.probability for r in routings]), axis=0)
    tokens = jnp.maximum(jnp.sum(chosen[0]), 1)
    return chosen.shape[1] * jnp.sum(chosen / tokens * (probability / tokens))


def busiest_expert(routings: Sequence[Routing]) -> Array:
    """How many tokens the busiest expert of a layer has, divided by the mean over its experts; the
    mean over these layers, float32. 1: all are used alike; E / k: always the same ones."""
    loads = jnp.stack([jnp.sum(r.chosen, axis=0) for r in routings])
    mean = jnp.maximum(jnp.mean(loads, axis=1), 1e-9)
    return jnp.mean(jnp.max(loads, axis=1) / mean)


class Gate(nnx.Module):
    """x [..., d] -> x W [..., n]: logits of the router, or of the shared expert's weight.

    Not `nnx.Linear`, so that adapters leave it alone.
    """

    def __init__(self, config: Backbone, n: int, dtype, rngs: nnx.Rngs):
        self.kernel = _kernel((config.hidden_size, n), ("embed", None), config, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        return one_row_twice(lambda x: x @ self.kernel[...].astype(x.dtype), x)


class Experts(nnx.Module):
    """E SwiGLU MLPs, stacked: gate_up_proj [E, d, 2 F] (gate | up), down_proj [E, F, d]."""

    def __init__(self, config: Backbone, moe: MoEConfig, dtype, rngs: nnx.Rngs):
        E, d, F = moe.num_experts, config.hidden_size, moe.intermediate_size
        into, out = ("experts", "embed", None), ("experts", None, "embed")
        self.gate_up_proj = _kernel((E, d, 2 * F), into, config, dtype, rngs)
        self.down_proj = _kernel((E, F, d), out, config, dtype, rngs)

    def __call__(self, x: Array, experts: Array, weights: Array, impl: str) -> Array:
        """sum_k weights[n, k] MLP_experts[n, k](x[n]), float32 [N, d].

        Args:
          x: [N, d].
          experts: [N, k] integers; those that are none of 0 .. E - 1 add nothing.
          weights: [N, k] float32.
          impl: implementation of `grouped_matmul`.
        """
        (N, k), E = experts.shape, len(self.gate_up_proj[...])
        group = jnp.where((experts >= 0) & (experts < E), experts, E).reshape(-1)
        order = jnp.argsort(group, stable=True)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(N * k), unique_indices=True)
        sizes = jnp.sum(group[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
        rows = _by_expert(x, order, place)
        both = kept(self.product("gate_up_proj", rows, sizes, impl), PRODUCT)
        gate, up = jnp.split(both, 2, axis=-1)
        y = kept(self.product("down_proj", jax.nn.silu(gate) * up, sizes, impl), PRODUCT)
        y = _by_token(y, order, place).reshape(N, k, -1)
        return jnp.sum(weights[..., None] * exact(y), axis=1)

    def product(self, name: str, x: Array, sizes: Array, impl: str) -> Array:
        """Rows x [M, in], the first sizes[0] of expert 0 and so on, times their expert's matrix of
        this stack: [M, out]."""
        W = getattr(self, name)[...].astype(x.dtype)
        return grouped_matmul(x, W, sizes, impl=impl)


class MoE(nnx.Module):
    """sum of a token's experts, each times its weight, and the shared expert, if there is one.

    On a mesh, tensor parallel devices share the experts out among them. Each keeps all tokens, runs
    those that go to its experts, and one all-reduce adds the parts.
    """

    def __init__(self, config: Backbone, dtype, rngs: nnx.Rngs):
        moe = config.moe
        assert moe is not None
        self.k, self.renormalize = moe.experts_per_token, moe.renormalize
        self.gate = Gate(config, moe.num_experts, dtype, rngs)
        self.experts = Experts(config, moe, dtype, rngs)
        if (width := moe.shared_intermediate_size) is None:
            self.shared_expert = self.shared_expert_gate = None
        else:
            plain = dataclasses.replace(config, intermediate_size=width, mlp_bias=False)
            self.shared_expert = MLP(plain, dtype, rngs)
            self.shared_expert_gate = Gate(config, 1, dtype, rngs)

    def __call__(
        self, x: Array, ctx: Context, experts: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """x [B, T, d] -> y [B, T, d], what the router decided: the fields of `Routing`, as a dict
        because `nnx.tabulate` knows no other results with names.

        `experts` [B, T, k] are taken in place of the router's choice, with its weights for them.
        """
        logits = self.gate(x)
        p = jax.nn.softmax(exact(logits), axis=-1)
        if experts is None:
            weights, experts = jax.lax.top_k(p, self.k)
        else:
            weights = jnp.take_along_axis(p, experts, axis=-1)
        if self.renormalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        # Padding goes to no expert.
        valid = ctx.mask(jnp.ones(x.shape[:2], bool))[..., None]
        taken = jnp.where(valid, experts, -1)
        is_chosen = taken[..., None] == jnp.arange(p.shape[-1])
        routing = Routing(
            logits,
            experts,
            jnp.sum(is_chosen, axis=(0, 1), dtype=jnp.float32),
            jnp.sum(jnp.where(valid, p, 0), axis=(0, 1)),
        )
        return self._run(x, taken, jnp.where(valid, weights, 0), ctx), routing._asdict()

    def _run(self, x: Array, experts: Array, weights: Array, ctx: Context) -> Array:
        """The experts on the devices that have them."""
        mesh = ctx.mesh
        gate = self.shared_expert_gate
        opened = None if gate is None else jax.nn.sigmoid(gate(x))
        variables, structure = jax.tree.flatten(
            (self.experts, self.shared_expert), is_leaf=lambda v: isinstance(v, nnx.Variable)
        )
        dims = [v.get_metadata()["dims"] for v in variables]
        split = {a: () if mesh is None else _several(mesh, a) for a in (AXES.heads, AXES.embed)}

        def local(x: Array, experts: Array, weights: Array, opened: Array | None, held: list):
            held = [_gathered(a, d, split[AXES.embed]) for a, d in zip(held, dims, strict=True)]
            pairs = zip(variables, held, strict=True)
            routed, shared = jax.tree.unflatten(structure, [v.replace(a) for v, a in pairs])
            if split[AXES.heads]:
                own = len(routed.gate_up_proj[...])
                experts = experts - jax.lax.axis_index(split[AXES.heads]) * own
            rows, k = x.reshape(-1, x.shape[-1]), experts.shape[-1]
            y = routed(rows, experts.reshape(-1, k), weights.reshape(-1, k), ctx.impl)
            y = y.reshape(x.shape)
            if shared is not None:
                y = y + exact(opened * shared(x))
            y = y.astype(x.dtype)
            return jax.lax.psum(y, split[AXES.heads]) if split[AXES.heads] else y

        if split[AXES.embed]:
            local = jax.checkpoint(local, policy=_is_no_gather)
        args = x, experts, weights, opened, [v.get_value() for v in variables]
        letters = ["".join(_LETTERS[d] for d in names) for names in dims]
        tokens = "bT-"
        in_dims = tokens, tokens, tokens, None if opened is None else tokens, letters
        return call(local, mesh, len(x), args, in_dims, tokens)


def _kernel(shape: tuple[int, ...], dims: Dims, config: Backbone, dtype, rngs: nnx.Rngs) -> Any:
    normal = nnx.initializers.normal(config.initializer_range)
    return nnx.Param(normal(rngs.params(), shape, dtype), dims=dims)


def _several(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in axes if mesh.shape[a] > 1)


def _is_no_gather(primitive: Any, *_: Any, **__: Any) -> bool:
    """The backward pass gathers parameters again: kept, they would be whole on every device."""
    return primitive.name != "all_gather"


def _gathered(a: Array, dims: Dims, axes: tuple[str, ...]) -> Array:
    """A parameter with its hidden dimension whole; its gradient is scattered again."""
    if "embed" not in dims or not axes:
        return a
    return jax.lax.all_gather(a, axes, axis=dims.index("embed"), tiled=True)


@jax.custom_vjp
def _by_expert(x: Array, order: Array, place: Array) -> Array:
    """x [N, d], one row per token, as [N k, d], one row per token and slot, sorted by expert.

    Its gradient, and that of `_by_token`, only gathers, since scattering would add in any order.

    Args:
      order: [N k], the pair of token and slot (token * k + slot) of each row.
      place: [N k], the inverse: where each pair is.
    """
    return x[order // (len(order) // len(x))]


def _by_expert_forward(x: Array, order: Array, place: Array):
    return _by_expert(x, order, place), (len(x), place)


def _by_expert_backward(saved, d_rows: Array):
    N, place = saved
    d = exact(d_rows[place]).reshape(N, -1, d_rows.shape[-1])
    return jnp.sum(d, axis=1).astype(d_rows.dtype), None, None


_by_expert.defvjp(_by_expert_forward, _by_expert_backward)


@jax.custom_vjp
def _by_token(y: Array, order: Array, place: Array) -> Array:
    """Rows [N k, d] that are sorted by expert in the order of tokens and slots again."""
    return y[place]


_by_token.defvjp(lambda y, order, place: (y[place], order), lambda order, d: (d[order], None, None))
