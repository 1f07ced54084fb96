"""Where the first value that is not finite (infinite or not a number) arose in a training run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.sharding import row_parts
from hmf_jax.training.loss import next_token_loss
from hmf_jax.training.remat import Remat
from hmf_jax.training.step import Loss, TrainState

Array = jax.Array
Batch = Mapping[str, Any]


def find_not_finite(state: TrainState, batch: Batch, loss: Loss | None = None) -> str:
    """Where the first value that is not finite arises: in a parameter, in the output of a layer, in
    the logits, or in the gradients (the last layer that has one: they flow backwards).

    Looks at as few rows of the batch at a time as the mesh allows. `loss` is that of
    `make_train_step`.
    """
    for name, p in (state.frozen | state.params).items():
        if jnp.issubdtype(p.dtype, jnp.floating) and not jnp.isfinite(p).all():
            return f"Parameter {name} is not finite."
    bare = jax.eval_shape(TrainState.model, state)  # without its arrays
    kinds, mesh, rows = bare.config.layer_kinds, bare.mesh, len(batch["tokens"])
    groups = max(1, rows // row_parts(mesh)) if mesh is not None else rows
    for i in range(groups):
        some = {name: jnp.asarray(a)[i::groups] for name, a in batch.items()}
        mixers, blocks, value = jax.device_get(_finite_forward(state, some, loss))
        for layer, (mixer, block) in enumerate(zip(mixers, blocks, strict=True)):
            if not block:
                part = "block" if mixer else "mixer"
                return (
                    f"The {part} of layer {layer} ({kinds[layer]}) is the first to be not finite."
                )
        if not value:
            return "All layers are finite; the logits or the loss are not."
    bad: set[str] = set()
    for i in range(groups):
        some = {name: jnp.asarray(a)[i::groups] for name, a in batch.items()}
        bad |= {
            n for n, ok in jax.device_get(_finite_gradients(state, some, loss)).items() if not ok
        }
    if not bad:
        return "Nothing is found now: the parameters have changed since."

    def depth(name: str) -> int:
        if name.startswith("layers."):
            return int(name.split(".")[1])
        return -1 if name.startswith("embed_tokens") else len(kinds)

    top = max(map(depth, bad))
    what = f"layer {top} ({kinds[top]})" if 0 <= top < len(kinds) else "no layer"
    names = ", ".join(sorted(n for n in bad if depth(n) == top))
    return f"The forward pass is finite; the first gradients that are not are in {what}: {names}."


@functools.partial(jax.jit, static_argnums=2)
def _finite_forward(
    state: TrainState, batch: Batch, loss: Loss | None
) -> tuple[list[Array], list[Array], Array]:
    """For each layer whether the mixer's output is finite, and the block's; and the loss."""
    model = state.model()
    positions, segment_ids = batch.get("positions"), batch.get("segment_ids")
    x, ctx = model.embed(batch["tokens"], positions=positions, segment_ids=segment_ids)
    seen = [(layer.mixed, layer.x) for layer in model.blocks(x, ctx)]
    valid = jnp.ones(x.shape[:2], bool)
    if ctx.lengths is not None:  # padding is last here, and may hold anything
        valid = jnp.arange(x.shape[1]) < ctx.lengths[:, None]

    def finite(a: Array) -> Array:
        return jnp.all(jnp.isfinite(a) | ~valid[..., None])

    value = jnp.isfinite((loss or next_token_loss)(model, **batch)[0])
    return [finite(mixed) for mixed, _ in seen], [finite(x) for _, x in seen], value


@functools.partial(jax.jit, static_argnums=2)
def _finite_gradients(state: TrainState, batch: Batch, loss: Loss | None) -> dict[str, Array]:
    """For each trained parameter whether its gradient is finite."""

    def objective(params: dict[str, Array]) -> Array:
        model = state.template.model(state.frozen | params)
        model.layers = nnx.List([Remat(block, "block") for block in model.layers])
        return (loss or next_token_loss)(model, **batch)[0]

    return jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), jax.grad(objective)(state.params))
