"""What a model remembers: the questions it answers right, with its states and without them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.embedded import corpus
from hmf_jax.mixers import AttentionState, BMojoState, WindowState
from hmf_jax.model import HybridLM
from hmf_jax.state import ModelState


def forget(state: ModelState, wanted: jax.Array) -> ModelState:
    """The state as if its recurrent layers had seen nothing, if wanted; windows of tokens stay.

    B'MOJO-F's fading tokens are outputs of its inner recurrent mixer, so they go too.
    """

    def clear(x: jax.Array) -> jax.Array:
        return jnp.where(wanted, 0, x)

    def one(layer: Any) -> Any:
        if isinstance(layer, AttentionState | WindowState):
            return layer
        new = jax.tree.map(clear, layer)
        if isinstance(layer, BMojoState):
            W = layer.k_pending.shape[1]
            k, v = (x.at[:, W:].set(clear(x[:, W:])) for x in (layer.k, layer.v))
            new = dataclasses.replace(new, k=k, v=v)
        return new

    return dataclasses.replace(state, layers=tuple(map(one, state.layers)))


@jax.jit
def answers(
    model: HybridLM, context: jax.Array, question: jax.Array, num_iter: Any, forgetful: jax.Array
) -> jax.Array:
    """What the model would say next at each token of the question but the last, [B, Q - 1].

    context [B, T]; forgetful: zero the recurrent states before the question.
    """
    state = model.init_state(len(context), context.shape[1] + question.shape[1])
    _, state = model(context, state=state, num_iter=num_iter, last_only=True)
    assert state is not None
    logits, _ = model(question, state=forget(state, forgetful), num_iter=num_iter)
    return jnp.argmax(logits[:, :-1], axis=-1)


def accuracy(
    model: HybridLM,
    asked: corpus.Questions,
    *,
    num_iter: int | None = None,
    forgetful: bool = False,
) -> float:
    """Fraction of questions answered right in all digits (chance: 1 / 90)."""
    if num_iter is None and model.config.gka is not None:
        num_iter = model.config.gka.num_iter
    said = answers(model, asked.context, asked.question, num_iter, jnp.array(forgetful))
    right = np.asarray(said) == asked.question[:, 1:]
    return float(right[:, asked.answer[1:]].all(axis=1).mean())
