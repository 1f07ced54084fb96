"""Where logits that are not finite come from: looked for only after a row has failed."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hmf_jax.engine.request import Request
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.state import ModelState


def why_not_finite(
    model: HybridLM,
    request: Request,
    made: Sequence[int],
    *,
    chunk: int,
    capacity: int,
    solver: str = "chebyshev",
    state: ModelState | None = None,
) -> str:
    """What to tell of a row whose logits are NaN or infinite: at which token, and since where.

    Args:
      model: the model.
      request: of the row.
      made: the new tokens before that one.
      chunk, capacity, solver: of the engine.
      state: of the row, if it began with tokens that are not known, which cannot be read again.
    """
    what = f"new token {len(made)}: the logits are NaN or infinite"
    if state is not None:
        where = first_bad_state(model, state)
        unknown = "the states of all layers are finite, so look at the last layer and the head"
    else:
        where = first_bad_layer(
            model, [*request.prompt, *made], num_iter=request.num_iter, chunk=chunk,
            capacity=capacity, solver=solver,
        )  # fmt: skip
        unknown = "the model's own are finite, so look at biases, penalties and the processor"
    return f"{what}; {unknown if where is None else f'the first to be so is {where}'}"


def first_bad_layer(
    model: HybridLM,
    tokens: Sequence[int],
    *,
    num_iter: int | None,
    chunk: int,
    capacity: int,
    solver: str = "chebyshev",
) -> str | None:
    """Reads the tokens of a row again, and names the first part whose output is not finite.

    Args:
      model: the model.
      tokens: all that the row has read.
      num_iter, solver: of the request.
      chunk: tokens are read in pieces of this many.
      capacity: of the row.

    Returns:
      None if everything is finite this time.
    """
    state = model.init_state(1, capacity)
    for start in range(0, len(tokens), chunk):
        piece = jnp.asarray(tokens[start : start + chunk], jnp.int32)[None]
        x, ctx = model.embed(piece, state=state, num_iter=num_iter, solver=solver)
        if not _finite(x):
            return "the embeddings"
        layers = []
        for i, layer in enumerate(model.blocks(x, ctx, state)):
            if not _finite(layer.x):
                part = "MLP" if _finite(layer.mixed) else "mixer"
                return f"the {part} of layer {i} ({_label(model, i)})"
            layers.append(layer.state)
            x = layer.x
        if not _finite(model.norm(x[:, -1:]) @ model.head_kernel().astype(x.dtype)):
            return "the output head"
        assert ctx.position is not None
        length = state.length + piece.shape[1]
        state = ModelState(tuple(layers), length, ctx.position, capacity)
    return None


def first_bad_state(model: HybridLM, state: ModelState) -> str | None:
    """Names the first layer that remembers something that is not finite, in any row."""
    for i, layer in enumerate(state.layers):
        if not all(_finite(x) for x in jax.tree.leaves(layer)):
            return f"the state of layer {i} ({_label(model, i)})"
    return None


def _finite(x: jax.Array) -> bool:
    return bool(jnp.isfinite(x).all())


def _label(model: HybridLM, layer: int) -> str:
    return KINDS[model.config.student_kinds[layer]].label
