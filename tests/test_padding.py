"""Padding has one owner: tokens are arranged once, without sorting, and nothing else is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.model import HybridLM
from hmf_jax.padding import arrange, restore, valid_first
from tests.util import random_model, tiny_config


def test_valid_tokens_come_first_and_go_back():
    rng = np.random.default_rng(0)
    valid = jnp.asarray(rng.random((3, 9)) < 0.6)
    x = jnp.asarray(rng.integers(1, 99, (3, 9)))
    place = valid_first(valid)
    arranged = arrange(x, place)
    for row in range(3):
        front, back = x[row][valid[row]], x[row][~valid[row]]
        assert arranged[row].tolist() == [*front.tolist(), *back.tolist()]
    assert (restore(arranged, place) == x).all()
    wide = jnp.stack([arranged, -arranged], axis=-1)
    assert (restore(wide, place)[..., 1] == -x).all()
    assert arrange(x, None) is x and restore(x, None) is x


@pytest.mark.parametrize("kind", ["*", "SWA", "GKA", "GDN", "M2", "BMF"])
def test_no_layer_sorts(kind):
    """A prefill that knows how many tokens are valid costs a mask more than one without padding."""
    model = random_model(tiny_config((kind,)), jnp.float32)
    tokens, ones = jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8), jnp.int32)

    def count(word: str, **padding: jax.Array) -> int:
        run = jax.jit(lambda model, state, padding: model(tokens, state=state, **padding)[0])
        text = run.lower(model, model.init_state(2, 16), padding).as_text()
        return text.count(f'"stablehlo.{word}"(')

    for padding in ({}, {"lengths": ones[:, 0]}, {"segment_ids": ones}):
        assert count("sort", **padding) == 0
    assert 0 < count("gather") <= count("gather", lengths=ones[:, 0]) <= count("gather") + 3


def test_an_eager_call_keeps_no_activations(monkeypatch):
    model = HybridLM.init(tiny_config(("*",) * 6), dtype=jnp.float32)
    head, alive = HybridLM._head, []

    def spy(self, x):
        alive.append(sum(a.shape == (3, 41, 32) for a in jax.live_arrays()))
        return head(self, x)

    monkeypatch.setattr(HybridLM, "_head", spy)
    model(jnp.zeros((3, 41), jnp.int32))
    assert len(alive) == 1 and alive[0] <= 3
