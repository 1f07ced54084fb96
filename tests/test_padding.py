"""Padding has one owner: tokens are arranged once, without sorting, and nothing else is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.model import HybridLM
from hmf_jax.padding import arrange, restore, valid_first
from tests.util import random_model, rel, tiny_config


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


def test_gradients_know_that_no_place_repeats():
    """Else the transpose of `restore` would add up, one after the other on a GPU."""
    place = valid_first(jnp.asarray([[True, False, True]]))
    gradient = jax.make_jaxpr(jax.grad(lambda x: restore(x, place).sum()))(jnp.ones((1, 3, 2)))
    (scatter,) = [e for e in gradient.eqns if e.primitive.name.startswith("scatter")]
    assert scatter.params["unique_indices"]


call = jax.jit(lambda model, tokens, state=None, **given: model(tokens, state=state, **given))


def test_given_positions_move_with_their_tokens():
    """Padding on the left and in between, and positions that are not those of the tokens."""
    model = random_model(tiny_config(("*",)), jnp.float32)
    rng = np.random.default_rng(1)
    tokens, positions = rng.integers(0, 64, (2, 8)), rng.integers(0, 50, (2, 8))
    ids = np.asarray([[0, 0, 7, 7, 0, 7, 7, 0], [4, 0, 4, 4, 4, 4, 4, 4]])
    padded = call(model, tokens, positions=positions, segment_ids=ids)[0]
    order = np.argsort(ids == 0, axis=1, kind="stable")
    front = [np.take_along_axis(x, order, axis=1) for x in (tokens, positions, ids)]
    plain = call(model, front[0], positions=front[1], segment_ids=front[2])[0]
    for row in range(2):
        count = (ids[row] != 0).sum()
        assert rel(padded[row][ids[row] != 0], plain[row, :count]) < 1e-5
    others = call(model, tokens, positions=positions[:, ::-1], segment_ids=ids)[0]
    assert rel(padded[1, 2:], others[1, 2:]) > 1e-2


def test_with_a_state_every_number_but_zero_is_valid():
    """Numbers of documents are for whole sequences; a state's row is one."""
    model = random_model(tiny_config(("*", "M2")), jnp.float32)
    tokens = np.random.default_rng(2).integers(0, 64, (2, 6))
    ids = np.asarray([[5, 5, 0, 3, 3, 2], [0, 2, 9, 9, -4, 0]])
    state = model.init_state(2, 16)
    logits, after = call(model, tokens, state, segment_ids=ids)
    wanted, expected = call(model, tokens, state, segment_ids=(ids != 0).astype(ids.dtype))
    np.testing.assert_array_equal(after.length, [5, 4])
    np.testing.assert_array_equal(after.position, [5, 4])
    np.testing.assert_array_equal(logits[ids != 0], wanted[ids != 0])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


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
    head, alive = HybridLM.logits, []

    def spy(self, x):
        alive.append(sum(a.shape == (3, 41, 32) for a in jax.live_arrays()))
        return head(self, x)

    monkeypatch.setattr(HybridLM, "logits", spy)
    model(jnp.zeros((3, 41), jnp.int32))
    assert len(alive) == 1 and alive[0] <= 3
